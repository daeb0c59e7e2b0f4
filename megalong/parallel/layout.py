"""ParallelLayout: the process groups of a run, made once and passed in. No function asks a global for a group."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.distributed import ProcessGroup

from megalong.parallel.cpu import enable_megatron_on_cpu


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelLayout:
    """Ranks and groups of this process. A replica is the tp x cp x pp ranks that share one batch."""

    rank: int
    world_size: int
    device: torch.device
    tp_rank: int
    tp_size: int
    cp_size: int
    pp_rank: int  # pipeline stage; 0 embeds, the last one holds the output head
    pp_size: int
    dp_rank: int
    dp_size: int
    replica_rank: int  # rank inside the replica
    replica_size: int
    tp: ProcessGroup
    pp: ProcessGroup  # the stages of a replica that have the same place in their stage, in order
    model: ProcessGroup  # tp x pp: ranks that hold the model once between them
    tied: ProcessGroup | None  # first and last stage, which both hold a tied embedding; None between them
    dp: ProcessGroup  # ranks with the same place in every replica (times cp: megatron's gradient group)
    replica: ProcessGroup
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


def start_process_group(*, timeout_minutes: int) -> torch.device:
    """Join the process group torchrun (or srun) describes in the environment; alone without one.

    NCCL with one GPU per local rank when CUDA is there, gloo on the CPU otherwise.
    """
    use_gpu = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if use_gpu:
        if local_rank >= torch.cuda.device_count():
            raise RuntimeError(
                f"LOCAL_RANK={local_rank} but this node has {torch.cuda.device_count()} GPU(s); "
                "start at most one process per GPU (torchrun --nproc-per-node)"
            )
        torch.cuda.set_device(local_rank)
    else:
        enable_megatron_on_cpu()
    if not dist.is_initialized():
        options = {
            "backend": "nccl" if use_gpu else "gloo",
            "timeout": datetime.timedelta(minutes=timeout_minutes),
        }
        if "RANK" in os.environ:
            dist.init_process_group(**options)
        else:
            dist.init_process_group(**options, store=dist.HashStore(), rank=0, world_size=1)
    return torch.device("cuda", local_rank) if use_gpu else torch.device("cpu")


def make_layout(*, tp: int, cp: int, pp: int, seed: int, timeout_minutes: int = 30) -> ParallelLayout:
    """Start the process group if needed, split it into TP x CP x PP x DP groups, seed megatron's RNG.

    Raises ValueError when the world size is not a multiple of tp * cp * pp.
    """
    device = start_process_group(timeout_minutes=timeout_minutes)
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
    )
    if device.type == "cuda":
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
    dp_rank = parallel_state.get_data_parallel_rank(with_context_parallel=False)
    replica = _replica_group(dp_rank, world_size)
    return ParallelLayout(
        rank=rank,
        world_size=world_size,
        device=device,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=tp,
        cp_size=cp,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=pp,
        dp_rank=dp_rank,
        dp_size=parallel_state.get_data_parallel_world_size(with_context_parallel=False),
        replica_rank=dist.get_rank(replica),
        replica_size=tp * cp * pp,
        tp=parallel_state.get_tensor_model_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        model=parallel_state.get_model_parallel_group(),
        tied=parallel_state.get_embedding_group(check_initialized=False),
        dp=parallel_state.get_data_parallel_group(with_context_parallel=True),
        replica=replica,
        world=dist.group.WORLD,
    )


def _replica_group(dp_rank: int, world_size: int) -> ProcessGroup:
    """The group of all ranks with this rank's dp_rank; every rank creates every group, as NCCL requires."""
    dp_ranks: list[int] = [0] * world_size
    dist.all_gather_object(dp_ranks, dp_rank)
    mine = None
    for replica in sorted(set(dp_ranks)):
        group = dist.new_group([rank for rank, owner in enumerate(dp_ranks) if owner == replica])
        if replica == dp_rank:
            mine = group
    return mine


def destroy_layout() -> None:
    """Tear the groups down (tests start several layouts in one process)."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
