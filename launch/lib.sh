# Sourced by the launch scripts: where the checkout is, which Python, and `run`.
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}
# On SIGTERM a run saves and exits; torchrun would kill it 30 s later, too soon for a checkpoint of 90 GB.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-270}

# Run a command, or with MEGALONG_DRY_RUN=1 only print it.
run() {
  if [[ ${MEGALONG_DRY_RUN:-0} == 1 ]]; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

# torchrun_local PROCESSES ARGS...: `megalong ARGS` on that many processes of this machine.
torchrun_local() {
  local processes=$1
  shift
  run "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$processes" -m megalong "$@"
}
