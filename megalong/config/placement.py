"""Which GPUs of a node the vLLM engines have and which training processes drive them: plain numbers, no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megalong.config.errors import ConfigError
from megalong.config.model_shape import ModelShape
from megalong.config.tree import EnginePlacement, ParallelConfig, RolloutConfig

Engines = Sequence[range | None]
"""Of each training process of a node: the numbers of the GPUs of the engine that it drives; None: it drives none."""


def place_engines(rollout: RolloutConfig, *, gpus: int, processes: int) -> tuple[EnginePlacement, Engines]:
    """Where the engines of a node are: disaggregated or colocated.

    gpus: that each process of the node sees; its `processes` training processes are on the first of them. Raises
    ConfigError when the engines do not fit.
    """
    size, count, free = rollout.engine_tp, rollout.engines_per_node, gpus - processes
    placement, chosen = rollout.placement, f"rollout.placement={rollout.placement.name}"
    if placement is EnginePlacement.auto:
        placement = EnginePlacement.disaggregated if free >= size else EnginePlacement.colocated
        enough = "enough" if free >= size else "too few"
        chosen += (
            f" chose {placement.name}, because the {processes} training processes of a node with {gpus} GPUs leave "
            f"{max(0, free)}, {enough} for an engine of {size} (rollout.engine_tp)"
        )
    if placement is EnginePlacement.colocated:
        if free < 0:
            raise ConfigError(
                f"{chosen}: a process sees {gpus} GPU(s) (CUDA_VISIBLE_DEVICES) and its node has {processes} training "
                "processes, each on one of its own; let every process see all of them, as torchrun does, or set "
                "rollout.engine=embedded"
            )
        if processes % size:
            raise ConfigError(
                f"{chosen}: rollout.engine_tp={size} does not divide the {processes} training processes of a node, "
                "whose GPUs the engines share; choose a divisor"
            )
        return placement, [range(at, at + size) if at % size == 0 else None for at in range(processes)]
    if free < size * count:
        raise ConfigError(
            f"{chosen}: {count} engines (rollout.engines_per_node) of {size} GPUs (rollout.engine_tp) do not fit into "
            f"the {max(0, free)} GPUs that the {processes} training processes of a node with {gpus} leave; start fewer "
            "processes, lower one of the two, or set rollout.placement=colocated"
        )
    if count > processes:
        raise ConfigError(
            f"{chosen}: rollout.engines_per_node={count} is more than the {processes} training processes of a node, "
            "each of which drives at most one; raise rollout.engine_tp instead"
        )
    engines: list[range | None] = [None] * processes
    for index in range(count):  # spread over the processes, so that every replica may have one
        first = processes + index * size
        engines[index * processes // count] = range(first, first + size)
    return placement, engines


def idle_gpus(rollout: RolloutConfig, placed: tuple[EnginePlacement, Engines], *, gpus: int) -> str:
    """What to change where a node has GPUs without a training process and without an engine; "" where it has none.

    placed: what place_engines gave for a node with so many GPUs.
    """
    placement, engines = placed
    used = {*range(len(engines)), *(number for engine in engines if engine is not None for number in engine)}
    idle = gpus - len(used)
    if not idle:
        return ""
    change = f"raise rollout.engines_per_node={rollout.engines_per_node} or rollout.engine_tp={rollout.engine_tp}"
    if placement is EnginePlacement.colocated:
        change = f"set rollout.placement=disaggregated with a rollout.engine_tp of at most {idle}"
    return (
        f"{idle} of a node's {gpus} GPUs are idle: no training process and no {placement.name} vLLM engine is on "
        f"them; {change}, or start more processes than {len(engines)}"
    )


def replica_problems(parallel: ParallelConfig, engines: Engines, *, world_size: int) -> Iterator[str]:
    """Replicas that no process with an engine belongs to, when every node has these engines."""
    driven = {replica_of(rank, parallel, world_size=world_size)
              for rank in range(world_size) if engines[rank % len(engines)] is not None}  # fmt: skip
    lacking = [index for index in range(_replicas(parallel, world_size)) if index not in driven]
    if lacking:
        count = sum(engine is not None for engine in engines)
        yield (
            f"{len(lacking)} of {_replicas(parallel, world_size)} replicas (the first: {lacking[0]}) have no rollout "
            f"engine: a node has {count} (rollout.engines_per_node) for its {len(engines)} training processes; raise "
            "it or make replicas larger (parallel.tp, cp, pp)"
        )


def colocated_problems(rollout: RolloutConfig, parallel: ParallelConfig, *, world_size: int) -> Iterator[str]:
    """The engine sleeps and wakes with one replica: its GPUs must be that replica's."""
    size, stage = rollout.engine_tp, parallel.tp * parallel.cp
    if _replicas(parallel, world_size) > 1 and stage % size:
        yield (
            f"rollout.engine_tp={size} does not divide parallel.tp={parallel.tp} x parallel.cp={parallel.cp} = "
            f"{stage}, so a colocated engine would be on the GPUs of several replicas; choose a divisor, or "
            "rollout.placement=disaggregated"
        )


def head_problems(model: ModelShape, *, key: str, size: int) -> Iterator[str]:
    """Why layers cannot be cut over so many tensor-parallel ranks; nothing when they can.

    More ranks than key-value heads are fine when each head is shared by as many ranks.
    """
    for name, whole in (("attention heads", model.heads), ("ffn width", model.ffn)):
        if whole % size:
            yield f"{key}={size} does not divide the model's {whole} {name}; choose a divisor of {whole}"
    if model.kv_heads % size and size % model.kv_heads:
        yield (
            f"{key}={size} neither divides the model's {model.kv_heads} key-value heads nor is a multiple of them; "
            f"choose a divisor or a multiple of {model.kv_heads}"
        )


def replica_of(rank: int, parallel: ParallelConfig, *, world_size: int) -> int:
    """Which replica a rank belongs to: tensor ranks are next to each other, then context, replicas, pipeline stages."""
    return rank // (parallel.tp * parallel.cp) % _replicas(parallel, world_size)


def _replicas(parallel: ParallelConfig, world_size: int) -> int:
    return max(1, world_size // (parallel.tp * parallel.cp * parallel.pp))
