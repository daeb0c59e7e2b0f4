#!/usr/bin/env bash
# The whole of megalong on a CPU: draw videos, make a tiny LongVILA, SFT, GRPO, held-out accuracy, report.
#
#   launch/demo.sh [section.key=value ...]        (`make demo` does this inside .venv)
#
# SEED  environment: seed of data, model and training (default 1)
# OUT   environment: folder of everything it writes (default runs/demo); OUT/sft and OUT/grpo are made anew
# Overrides go to both training stages. MEGALONG_DRY_RUN=1 prints the commands instead of running them.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$ROOT"

SEED=${SEED:-1} OUT=${OUT:-runs/demo}
# One thread per process: two processes with a pool each are slower than two without. No GPU even where there is one.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1
COMMON=("seed=$SEED" "data.seed=$SEED" "model.path=$OUT/model" "eval.manifest=$OUT/data/heldout.jsonl")

# stage NAME COMMAND...: run it and note its seconds.
TIMES=()
stage() {
  local name=$1 start=$SECONDS
  shift
  echo "== $name"
  "$@"
  TIMES+=("\"$name\": $((SECONDS - start))")
}

run rm -rf "$OUT/sft" "$OUT/grpo"
stage data run "$PYTHON" -m megalong make-demo-data --out "$OUT" --seed "$SEED"
stage sft torchrun_local 2 sft launch/recipes/demo_sft.yaml "${COMMON[@]}" \
  "data.train=$OUT/data/train_sft.jsonl" "logger.run_dir=$OUT/sft" "$@"
stage grpo torchrun_local 2 grpo launch/recipes/demo_grpo.yaml "${COMMON[@]}" \
  "data.train=$OUT/data/train_rl.jsonl" "logger.run_dir=$OUT/grpo" "model.init_from=$OUT/sft/checkpoints" "$@"

if [[ ${MEGALONG_DRY_RUN:-0} != 1 ]]; then
  (IFS=,; echo "{${TIMES[*]}}") >"$OUT/seconds.json"
fi
run "$PYTHON" -m megalong report "$OUT"
