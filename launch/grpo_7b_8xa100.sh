#!/usr/bin/env bash
# GRPO of LongVILA-R1-7B on one node of 8 GPUs with 80 GB.
#
#   launch/grpo_7b_8xa100.sh MODEL_PATH DATA [section.key=value ...]
#
# MODEL_PATH  checkpoint folder (config.json, llm/, vision_tower/, mm_projector/)
# DATA        training manifest (.jsonl)
# RECIPE      environment: a recipe other than grpo_7b_256f.yaml, e.g. launch/recipes/grpo_7b_512f.yaml
# GPUS        environment: processes on this node (default 8)
# MEGALONG_DRY_RUN=1 prints the command instead of running it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

if (($# < 2)); then
  echo "usage: $0 MODEL_PATH DATA [section.key=value ...]" >&2
  exit 2
fi
MODEL_PATH=$1 DATA=$2
shift 2
RECIPE=${RECIPE:-$ROOT/launch/recipes/grpo_7b_256f.yaml}
GPUS=${GPUS:-8}

torchrun_local "$GPUS" grpo "$RECIPE" "gpus=$GPUS" "model.path=$MODEL_PATH" "data.train=$DATA" "$@"
