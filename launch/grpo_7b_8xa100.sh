#!/usr/bin/env bash
# GRPO of LongVILA-R1-7B on one node of 8 GPUs with 80 GB.
#
#   launch/grpo_7b_8xa100.sh MODEL_PATH DATA [section.key=value ...]
#
# MODEL_PATH  checkpoint folder (config.json, llm/, vision_tower/, mm_projector/)
# DATA        training manifest (.jsonl)
# RECIPE      environment: a recipe other than grpo_7b_256f.yaml, e.g. launch/recipes/grpo_7b_512f.yaml
# GPUS        environment: how many GPUs of this node to use, the first ones (default 8)
# ENGINE_GPUS environment: how many of them vLLM engines have for themselves, one each (default 0: they share the
#             trainer's); set parallel.* for the GPUs that are left. With rollout.engine_tp over 1 in the recipe, say
#             rollout.engines_per_node=N too: N engines of engine_tp GPUs each
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
share_gpus GPUS
first_gpus "$GPUS"

torchrun_local "$TRAINERS" grpo "$RECIPE" "gpus=$TRAINERS" "model.path=$MODEL_PATH" "data.train=$DATA" \
  "${ENGINE_OVERRIDES[@]}" "$@"
