#!/usr/bin/env bash
# GRPO of the demo's tiny model on 2 CPU processes; needs no GPU. launch/demo.sh makes the model and the data.
#
#   launch/grpo_tiny_cpu.sh [MODEL_PATH DATA] [section.key=value ...]
#
# MODEL_PATH  checkpoint folder (default runs/demo/model)
# DATA        training manifest (default runs/demo/data/train_rl.jsonl)
# The run's folder is runs/tiny_grpo (logger.run_dir=..): the demo's own run is complete. It starts from the SFT weights
# of the demo; model.init_from=null starts from MODEL_PATH's own.
# MEGALONG_DRY_RUN=1 prints the command instead of running it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

MODEL_PATH=runs/demo/model DATA=runs/demo/data/train_rl.jsonl
if (($# >= 2)) && [[ $1 != *=* && $2 != *=* ]]; then
  MODEL_PATH=$1 DATA=$2
  shift 2
fi
# One thread per process: two processes with a pool each are slower than two without. No GPU even where there is one.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} CUDA_VISIBLE_DEVICES=

torchrun_local 2 grpo "$ROOT/launch/recipes/demo_grpo.yaml" "model.path=$MODEL_PATH" "data.train=$DATA" \
  logger.run_dir=runs/tiny_grpo "$@"
