#!/usr/bin/env bash
# The whole of megalong on a CPU: draw videos, make a tiny LongVILA, SFT, GRPO, held-out accuracy, report.
#
#   launch/demo.sh [section.key=value ...]        (`make demo` does this inside .venv)
#
# SEED  environment: seed of data, model and training (default 1)
# OUT   environment: folder of everything it writes (default runs/demo); OUT/sft and OUT/grpo are made anew
# GPUS  environment: how many GPUs to use (default 0: two CPU processes). With GPUs the same recipes run on NCCL,
#       Transformer Engine layers and bf16, with vLLM as the sampler where it is installed.
# Overrides go to both training stages. MEGALONG_DRY_RUN=1 prints the commands instead of running them.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$ROOT"

SEED=${SEED:-1} OUT=${OUT:-runs/demo}
GPUS=${GPUS:-0}
whole GPUS 0
# One thread per process: two processes with a pool each are slower than two without.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
PROCESSES=$GPUS
if ((GPUS == 0)); then
  PROCESSES=2
  export CUDA_VISIBLE_DEVICES= # no GPU even where there is one
fi
COMMON=("seed=$SEED" "data.seed=$SEED" "model.path=$OUT/model" "eval.manifest=$OUT/data/heldout.jsonl")

if ((GPUS > 0)); then
  first_gpus "$GPUS"
  COMMON+=("model.dtype=bfloat16" "model.layer_spec=te" "rollout.engine=auto")
fi

# stage NAME COMMAND...: run it and note its seconds.
TIMES=()
stage() {
  local name=$1 start=$SECONDS
  shift
  echo "== $name"
  ("$@") # which torchrun takes the place of
  TIMES+=("\"$name\": $((SECONDS - start))")
}

run rm -rf "$OUT/sft" "$OUT/grpo"
stage data run "$PYTHON" -m megalong make-demo-data launch/recipes/demo_data.yaml "folder=$OUT" "seed=$SEED"
stage sft torchrun_local "$PROCESSES" sft launch/recipes/demo_sft.yaml "${COMMON[@]}" \
  "data.train=$OUT/data/train_sft.jsonl" "logger.run_dir=$OUT/sft" "$@"
stage grpo torchrun_local "$PROCESSES" grpo launch/recipes/demo_grpo.yaml "${COMMON[@]}" \
  "data.train=$OUT/data/train_rl.jsonl" "logger.run_dir=$OUT/grpo" "model.init_from=$OUT/sft/checkpoints" "$@"

if [[ ${MEGALONG_DRY_RUN:-0} != 1 ]]; then
  (IFS=,; echo "{${TIMES[*]}}") >"$OUT/seconds.json"
fi
run "$PYTHON" -m megalong report "$OUT"
