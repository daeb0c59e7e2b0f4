#!/usr/bin/env bash
# Chain-of-thought SFT of LongVILA-R1-7B on one node of 8 GPUs with 80 GB.
#
#   launch/sft_7b_8xa100.sh MODEL_PATH DATA [section.key=value ...]
#
# MODEL_PATH  checkpoint folder (config.json, llm/, vision_tower/, mm_projector/)
# DATA        training manifest (.jsonl)
# RECIPE      environment: a recipe other than sft_7b.yaml
# GPUS        environment: how many GPUs of this node to use, the first ones (default 8)
# MEGALONG_DRY_RUN=1 prints the command instead of running it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

if (($# < 2)); then
  echo "usage: $0 MODEL_PATH DATA [section.key=value ...]" >&2
  exit 2
fi
MODEL_PATH=$1 DATA=$2
shift 2
RECIPE=${RECIPE:-$ROOT/launch/recipes/sft_7b.yaml}
GPUS=${GPUS:-8}
whole GPUS 1
first_gpus "$GPUS"

torchrun_local "$GPUS" sft "$RECIPE" "gpus=$GPUS" "model.path=$MODEL_PATH" "data.train=$DATA" "$@"
