# Sourced by the launch scripts: where the checkout is, which Python, `run`, `become`, and how torchrun starts megalong.
#
# RESTARTS  environment: how often torchrun starts all processes again after one ended with an error or was killed
#           (default 0). They continue from the last checkpoint, so a small checkpoint.save_every loses little.
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3} RESTARTS=${RESTARTS:-0}
# On SIGTERM a run saves and exits; torchrun would kill it 30 s later, too soon for a checkpoint of 90 GB.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-270}

# Run a command, or with MEGALONG_DRY_RUN=1 only print it.
run() {
  dry "$@" || "$@"
}

# The same in the place of this shell, which as a container's first process would keep SIGTERM from the run, and as any
# other end by it and leave the run behind. Nothing comes after it.
become() {
  dry "$@" || exec "$@"
}

dry() {
  [[ ${MEGALONG_DRY_RUN:-0} == 1 ]] || return 1
  printf '%q ' "$@"
  printf '\n'
}

# whole NAME LOWEST: the variable NAME must be a whole number of at least LOWEST.
whole() {
  if [[ ! ${!1} =~ ^(0|[1-9][0-9]*)$ ]] || ((${!1} < $2)); then
    echo "$0: $1=${!1} must be a whole number of at least $2; change it" >&2
    exit 2
  fi
}
whole RESTARTS 0

# share_gpus NAME: of the GPUs that the variable NAME counts, ENGINE_GPUS are for vLLM engines, one each. Sets TRAINERS,
# the number of the others, and ENGINE_OVERRIDES.
share_gpus() {
  local gpus=${!1}
  ENGINE_GPUS=${ENGINE_GPUS:-0} ENGINE_OVERRIDES=()
  whole "$1" 0
  whole ENGINE_GPUS 0
  if ((ENGINE_GPUS > 0)); then
    ENGINE_OVERRIDES=(rollout.placement=disaggregated "rollout.engines_per_node=$ENGINE_GPUS")
  fi
  TRAINERS=$((gpus - ENGINE_GPUS))
  if ((TRAINERS < 1)); then
    echo "$0: ENGINE_GPUS=$ENGINE_GPUS leaves $TRAINERS of $1=$gpus to the trainer, which needs at least 1;" \
      "lower ENGINE_GPUS or raise $1" >&2
    exit 2
  fi
}

# first_gpus N: the run sees the first N of the GPUs that this shell sees, and no engine takes one beyond them.
first_gpus() {
  local all=${CUDA_VISIBLE_DEVICES-$(seq -s, 0 $(($1 - 1)))}
  CUDA_VISIBLE_DEVICES=$(cut -d, -f "1-$1" <<<"$all")
  export CUDA_VISIBLE_DEVICES
}

# torchrun_local PROCESSES ARGS...: become `megalong ARGS` on that many processes of this machine.
torchrun_local() {
  local processes=$1
  shift
  become "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$processes" --max-restarts "$RESTARTS" \
    -m megalong "$@"
}
