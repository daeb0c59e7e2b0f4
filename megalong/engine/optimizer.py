"""Mixed-precision AdamW with its states shared out over data-parallel ranks (ZeRO stage 1, whole parameters).

Each parameter's float32 master copy and moments live on one rank of the gradient group, which updates it and
broadcasts the result. Whole parameters, because a state then has the same tensor-parallel cut as its parameter:
checkpoints load at any TP, PP and DP split through megatron's dist_checkpointing, on the CPU and on GPUs alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor, nn

from megalong.parallel.layout import ParallelLayout

MOMENTS = ("exp_avg", "exp_avg_sq")
NORM_CHUNK = 1 << 22
"""Elements of a gradient that its norm reads at a time: a float64 copy of a whole embedding would take gigabytes."""


def assign_owners(sizes: Sequence[int], num_ranks: int) -> list[int]:
    """Owner rank of each parameter: largest first, each to the rank that holds least. Deterministic."""
    held = [0] * num_ranks
    owners = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        owner = held.index(min(held))
        owners[index] = owner
        held[owner] += sizes[index]
    return owners


class ShardedAdamW:
    """AdamW over the trainable parameters of a model; gradients are read from `main_grad` (float32, summed over DP)."""

    def __init__(
        self,
        named_parameters: Sequence[tuple[str, nn.Parameter]],
        layout: ParallelLayout,
        *,
        counted: frozenset[str],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        if not named_parameters:
            raise ValueError("nothing to train: set model.train_llm, model.train_projector or model.train_tower")
        self.named = list(named_parameters)
        self.layout = layout
        self.counted = counted  # names whose gradient this rank adds to the norm: others hold the rest, or a copy
        owners = assign_owners([param.numel() for _, param in self.named], dist.get_world_size(layout.gradient))
        self._owner = dict(zip((name for name, _ in self.named), owners, strict=True))
        me = dist.get_rank(layout.gradient)
        # A float32 (or wider) parameter is its own master copy.
        self.masters: dict[str, Tensor] = {
            name: param.detach() if param.dtype.itemsize >= 4 else param.detach().float().clone()
            for name, param in self.named
            if self._owner[name] == me
        }
        decayed = [tensor for tensor in self.masters.values() if tensor.ndim > 1]
        plain = [tensor for tensor in self.masters.values() if tensor.ndim <= 1]
        # Norm weights and biases are not decayed, as is usual.
        self.adam = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=lr,
            betas=betas,
            eps=eps,
            fused=layout.device.type == "cuda",
            foreach=layout.device.type != "cuda",
        )
        for master in self.masters.values():
            self.adam.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                **{moment: torch.zeros_like(master) for moment in MOMENTS},
            }

    def grad_norm(self) -> float:
        """L2 norm of the whole gradient, equal on all ranks; parameters that several ranks hold count once.

        Not finite when any element on any rank is not, duplicates included.
        """
        squares = torch.zeros((), dtype=torch.float64, device=self.layout.device)
        for name, param in self.named:
            # 0 * inf is NaN: a copy that went bad on this rank alone shows too.
            for part in param.main_grad.flatten().split(NORM_CHUNK):
                squares += part.double().square().sum() * float(name in self.counted)
        if dist.get_world_size(self.layout.model) > 1:
            dist.all_reduce(squares, group=self.layout.model)
        return squares.sqrt().item()

    @torch.no_grad()
    def step(self, *, lr: float, grad_scale: float) -> None:
        """One AdamW update with every gradient times grad_scale, then the new values to every rank."""
        for name, param in self.named:
            if name in self.masters:
                self.masters[name].grad = param.main_grad.to(self.masters[name].dtype) * grad_scale
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        for master in self.masters.values():
            master.grad = None
        group = self.layout.gradient
        for name, param in self.named:
            if name in self.masters:
                param.data.copy_(self.masters[name])
            if dist.get_world_size(group) > 1:
                dist.broadcast(param.data, src=dist.get_global_rank(group, self._owner[name]), group=group)

    @torch.no_grad()
    def refresh_masters(self) -> None:
        """Take the master copies from the parameters again (after weights were loaded from elsewhere)."""
        for name, param in self.named:
            if name in self.masters:
                self.masters[name].copy_(param.data)

    def sharded_state(self, model_state: dict[str, ShardedTensor]) -> dict[str, ShardedTensor]:
        """This rank's states as ShardedTensors, cut like `model_state[name]` (the model's sharded state dict)."""
        state: dict[str, ShardedTensor] = {}
        for name, master in self.masters.items():
            like = model_state[name]
            entries = {"master": master, **{moment: self.adam.state[master][moment] for moment in MOMENTS}}
            for kind, tensor in entries.items():
                # The owner is the only data-parallel rank that holds this state, so it is the one that writes it.
                changes = {
                    "key": f"optimizer.{kind}.{like.key}",
                    "data": tensor,
                    "replica_id": (*like.replica_id[:-1], 0),
                }
                if isinstance(like, ShardedTensor):  # a ShardedTensorFactory takes the dtype from its data
                    changes["dtype"] = tensor.dtype
                state[f"{kind}.{name}"] = dataclasses.replace(like, **changes)
        return state

    @torch.no_grad()
    def load_sharded_state(self, loaded: dict[str, Tensor], *, num_updates: int) -> None:
        """Take back what sharded_state described; `num_updates` is Adam's step count, common to all parameters."""
        for name, master in self.masters.items():
            master.copy_(loaded[f"master.{name}"])
            for moment in MOMENTS:
                self.adam.state[master][moment].copy_(loaded[f"{moment}.{name}"])
            self.adam.state[master]["step"].fill_(num_updates)
