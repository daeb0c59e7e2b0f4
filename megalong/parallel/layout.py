"""ParallelLayout: the process groups of a run, made once and passed in. No function asks a global for a group."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.distributed import ProcessGroup

from megalong.config.errors import ConfigError
from megalong.parallel.cpu import enable_megatron_on_cpu
from megalong.parallel.rendezvous import meet

MORE_MINUTES = 5.0
"""How much longer than a phase a collective may last: a rank that is stuck says so itself before the others give up."""
MINUTES_OF_A_YEAR = 365 * 24 * 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextGroups:
    """The context-parallel group and its two factors: ring rank j holds the ranks j * a2a_size .. of the group."""

    size: int = 1
    rank: int = 0
    a2a_size: int = 1
    ring_size: int = 1
    ring_rank: int = 0
    group: ProcessGroup | None = None  # None: this process alone
    a2a: ProcessGroup | None = None
    ring: ProcessGroup | None = None

    @property
    def alone(self) -> ContextGroups:
        """No context parallelism: the rank holds whole packs."""
        return ContextGroups()


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelLayout:
    """Ranks and groups of this process. A replica is the tp x cp x pp ranks that share one batch."""

    rank: int
    world_size: int
    device: torch.device
    tp_rank: int
    tp_size: int
    pp_rank: int  # pipeline stage; 0 embeds, the last one holds the output head
    pp_size: int
    dp_rank: int
    dp_size: int
    replica_rank: int  # rank inside the replica
    replica_size: int
    places: tuple[tuple[int, int, int], ...]  # (tp, cp, pp) rank of each rank of the replica
    tp: ProcessGroup
    context: ContextGroups
    pp: ProcessGroup  # the stages of a replica that have the same place in their stage, in order
    model: ProcessGroup  # tp x pp: ranks that hold the model once between them
    tied: ProcessGroup | None  # first and last stage, which both hold a tied embedding; None between them
    dp: ProcessGroup  # ranks with the same place in every replica
    gradient: ProcessGroup  # dp times cp: ranks that hold the same parameters
    replica: ProcessGroup
    replica_host: ProcessGroup  # the same ranks over gloo: who waits in NCCL keeps its GPU busy
    world: ProcessGroup

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1


def start_process_group(*, timeout: datetime.timedelta) -> torch.device:
    """Join the process group torchrun (or srun) describes in the environment; alone without one.

    NCCL with one GPU per local rank when CUDA is there, gloo on the CPU otherwise. With a GPU one thread computes on
    the CPU, as where torchrun starts several processes, if OMP_NUM_THREADS says no other number.
    """
    use_gpu = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if use_gpu:
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"LOCAL_RANK={local_rank} but this node has {torch.cuda.device_count()} GPU(s); start at most one "
                "process per GPU: lower torchrun's --nproc-per-node (GPUS of the launch scripts)"
            )
        torch.cuda.set_device(local_rank)
        if "OMP_NUM_THREADS" not in os.environ:
            # What a rank computes on the CPU is little. Processes with a thread for every core wait for each other:
            # cutting a pack of 131k tokens took 0.48 s beside three others on 64 cores, 0.01 s with one thread.
            torch.set_num_threads(1)
    else:
        enable_megatron_on_cpu()
    if not dist.is_initialized():
        store, rank, world_size = meet(timeout=timeout) if "RANK" in os.environ else (dist.HashStore(), 0, 1)
        dist.init_process_group(
            "nccl" if use_gpu else "gloo", store=store, rank=rank, world_size=world_size, timeout=timeout
        )
    return torch.device("cuda", local_rank) if use_gpu else torch.device("cpu")


def make_layout(
    *, tp: int, cp: int, pp: int, seed: int, cp_a2a: int = 1, timeout_minutes: float = 30
) -> ParallelLayout:
    """Start the process group if needed, split it into TP x CP x PP x DP groups, seed megatron's RNG.

    cp_a2a: how many ranks of a context-parallel group trade rows for heads; the others gather keys (ContextGroups).
    timeout_minutes: how long a phase may last; collectives of all groups wait MORE_MINUTES longer. 0: no limit.
    Raises ValueError when the world size is not a multiple of tp * cp * pp, or cp not one of cp_a2a.
    """
    if cp % cp_a2a:
        raise ValueError(f"parallel.cp={cp} is not a multiple of parallel.cp_a2a={cp_a2a}")
    minutes = timeout_minutes + MORE_MINUTES if timeout_minutes else MINUTES_OF_A_YEAR
    timeout = datetime.timedelta(minutes=minutes)
    device = start_process_group(timeout=timeout)
    world_size, rank = dist.get_world_size(), dist.get_rank()
    if world_size % (tp * cp * pp):
        raise ValueError(
            f"{world_size} processes cannot be split into replicas of tp={tp} x cp={cp} x pp={pp}; "
            "change --nproc-per-node or parallel.tp, parallel.cp, parallel.pp"
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=minutes,
    )
    if device.type == "cuda":
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
    dp_rank = parallel_state.get_data_parallel_rank(with_context_parallel=False)
    replica, on_gpu = _replica_group(dp_rank, world_size, timeout=timeout), device.type == "cuda"
    return ParallelLayout(
        rank=rank,
        world_size=world_size,
        device=device,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=tp,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=pp,
        dp_rank=dp_rank,
        dp_size=parallel_state.get_data_parallel_world_size(with_context_parallel=False),
        replica_rank=dist.get_rank(replica),
        replica_size=tp * cp * pp,
        places=_places(replica),
        tp=parallel_state.get_tensor_model_parallel_group(),
        context=_context_groups(world_size, a2a_size=cp_a2a, timeout=timeout),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        model=parallel_state.get_model_parallel_group(),
        tied=parallel_state.get_embedding_group(check_initialized=False),
        dp=parallel_state.get_data_parallel_group(with_context_parallel=False),
        gradient=parallel_state.get_data_parallel_group(with_context_parallel=True),
        replica=replica,
        replica_host=_replica_group(dp_rank, world_size, timeout=timeout, backend="gloo") if on_gpu else replica,
        world=dist.group.WORLD,
    )


def _places(replica: ProcessGroup) -> tuple[tuple[int, int, int], ...]:
    mine = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    places: list[tuple[int, int, int]] = [mine] * dist.get_world_size(replica)
    dist.all_gather_object(places, mine, group=replica)
    return tuple(places)


def _context_groups(world_size: int, *, a2a_size: int, timeout: datetime.timedelta) -> ContextGroups:
    """Split this rank's context-parallel group; every rank creates every group, as NCCL requires."""
    group = parallel_state.get_context_parallel_group()
    mine = dist.get_process_group_ranks(group)
    rank, size = mine.index(dist.get_rank()), len(mine)
    a2a = ring = group  # when one of the two factors is the group itself, the other has one rank and is never used
    if a2a_size not in (1, size):
        everyone: list[list[int]] = [[]] * world_size
        dist.all_gather_object(everyone, mine)
        for ranks in sorted({tuple(ranks) for ranks in everyone}):
            rows = [ranks[at : at + a2a_size] for at in range(0, len(ranks), a2a_size)]
            for members in rows:
                created = dist.new_group(list(members), timeout=timeout)
                a2a = created if dist.get_rank() in members else a2a
            for members in zip(*rows, strict=True):
                created = dist.new_group(list(members), timeout=timeout)
                ring = created if dist.get_rank() in members else ring
    return ContextGroups(
        size=size,
        rank=rank,
        a2a_size=a2a_size,
        ring_size=size // a2a_size,
        ring_rank=rank // a2a_size,
        group=group,
        a2a=a2a,
        ring=ring,
    )


def _replica_group(
    dp_rank: int, world_size: int, *, timeout: datetime.timedelta, backend: str | None = None
) -> ProcessGroup:
    """The group of all ranks with this rank's dp_rank; every rank creates every group, as NCCL requires."""
    dp_ranks: list[int] = [0] * world_size
    dist.all_gather_object(dp_ranks, dp_rank)
    mine = None
    for replica in sorted(set(dp_ranks)):
        ranks = [rank for rank, owner in enumerate(dp_ranks) if owner == replica]
        group = dist.new_group(ranks, timeout=timeout, backend=backend)
        if replica == dp_rank:
            mine = group
    return mine


def destroy_layout() -> None:
    """Tear the groups down (tests start several layouts in one process)."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
