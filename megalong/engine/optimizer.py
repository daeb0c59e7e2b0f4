"""Mixed-precision AdamW with its states shared out over data-parallel ranks (ZeRO stage 1, whole parameters).

Each parameter's float32 master copy and moments live on one rank of the gradient group, which updates it and
broadcasts the result. Whole parameters, because a state then has the same tensor-parallel cut as its parameter:
checkpoints load at any TP, PP and DP split through megatron's dist_checkpointing, on the CPU and on GPUs alike.

With optimizer.offload they live in host memory, in the same shapes, and visit the device in pieces for the update.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor, nn
from torch.optim.adamw import adamw

from megalong.parallel import host_tensors
from megalong.parallel.host_tensors import HostCopies, compute_on_device
from megalong.parallel.layout import ParallelLayout

KINDS = ("master", "exp_avg", "exp_avg_sq")
"""The states of a parameter, each of its shape."""
UPDATE_BYTES = 1 << 30
"""Of scaled gradients that an update makes at a time (of a larger parameter, all): those of a 7B would take 30 GB."""
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


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Piece:
    """A stretch of a parameter, flat: values and gradient on the device, states in host memory."""

    values: Tensor
    grad: Tensor
    states: tuple[Tensor, ...]  # KINDS, or without the master where the values are their own
    weight_decay: float


class ShardedAdamW:
    """AdamW over the trainable parameters of a model; gradients are read from `main_grad` (float32, summed over DP)."""

    def __init__(
        self,
        named_parameters: Sequence[tuple[str, nn.Parameter]],
        layout: ParallelLayout,
        *,
        counted: frozenset[str],
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        offload: HostCopies | None = None,  # of states in host memory; None: they live on the device
    ) -> None:
        if not named_parameters:
            raise ValueError("nothing to train: set model.train_llm, model.train_projector or model.train_tower")
        self.named = list(named_parameters)
        self.layout = layout
        self.counted = counted  # names whose gradient this rank adds to the norm: others hold the rest, or a copy
        self.betas, self.eps, self.weight_decay, self.offload = betas, eps, weight_decay, offload
        self.num_updates = 0
        owners = assign_owners([param.numel() for _, param in self.named], dist.get_world_size(layout.gradient))
        self._owner = dict(zip((name for name, _ in self.named), owners, strict=True))
        me = dist.get_rank(layout.gradient)
        self.owned = [(name, param) for name, param in self.named if self._owner[name] == me]
        self.states = {name: self._new_states(param) for name, param in self.owned}
        self.refresh_masters()

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
        if self.offload is None:
            self._update_here(lr=lr, grad_scale=grad_scale)
        else:
            self._update_in_pieces(self.offload, lr=lr, grad_scale=grad_scale)
        self.num_updates += 1
        # Behind all updates: between them, each rank would wait for the owner of the parameter before.
        group = self.layout.gradient
        if dist.get_world_size(group) > 1:
            for name, param in self.named:
                dist.broadcast(param.data, src=dist.get_global_rank(group, self._owner[name]), group=group)

    @torch.no_grad()
    def refresh_masters(self) -> None:
        """Take the master copies from the parameters again (after weights were loaded from elsewhere)."""
        for name, param in self.owned:
            if _is_its_own_master(param):
                continue
            master = self.states[name]["master"]
            # In pieces: on its way to the host, a tensor of another dtype is converted on the device.
            count = _elements_of_piece(master)
            for part, values in zip(master.view(-1).split(count), param.data.flatten().split(count), strict=True):
                part.copy_(values)

    def sharded_state(self, model_state: dict[str, ShardedTensor]) -> dict[str, ShardedTensor]:
        """This rank's states as ShardedTensors, cut like `model_state[name]` (the model's sharded state dict)."""
        state: dict[str, ShardedTensor] = {}
        for name, states in self.states.items():
            like = model_state[name]
            for kind, tensor in states.items():
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
        for name, states in self.states.items():
            for kind, tensor in states.items():
                tensor.copy_(loaded[f"{kind}.{name}"])
        self.num_updates = num_updates

    def _new_states(self, param: nn.Parameter) -> dict[str, Tensor]:
        """Zeros. A float32 (or wider) parameter is its own master copy."""
        own_master = _is_its_own_master(param)
        dtype = param.dtype if own_master else torch.float32

        def zeros() -> Tensor:
            if self.offload is None:
                return torch.zeros(param.shape, dtype=dtype, device=param.device)
            return self.offload.zeros(param.shape, dtype)

        return {kind: param.detach() if kind == "master" and own_master else zeros() for kind in KINDS}

    def _decay(self, param: nn.Parameter) -> float:
        """Norm weights and biases are not decayed, as is usual."""
        return self.weight_decay if param.ndim > 1 else 0.0

    def _update_here(self, *, lr: float, grad_scale: float) -> None:
        """Where the states are, a few parameters at a time: their scaled gradients are copies."""
        for weight_decay in sorted({self._decay(param) for _, param in self.owned}):
            mine = [(name, param) for name, param in self.owned if self._decay(param) == weight_decay]
            for together in _batches(mine, most_elements=UPDATE_BYTES // 4):
                states = [self.states[name] for name, _ in together]
                masters, *moments = ([of[kind] for of in states] for kind in KINDS)
                grads = [
                    param.main_grad.to(master.dtype) * grad_scale
                    for (_, param), master in zip(together, masters, strict=True)
                ]
                self._adamw(masters, grads, *moments, lr=lr, weight_decay=weight_decay)
        for name, param in self.owned:
            param.data.copy_(self.states[name]["master"])

    def _update_in_pieces(self, offload: HostCopies, *, lr: float, grad_scale: float) -> None:
        """States come from host memory and go back there."""
        pieces = list(self._pieces())

        def update(index: int, states: Sequence[Tensor]) -> None:
            piece = pieces[index]
            *masters, exp_avg, exp_avg_sq = states
            master = masters[0] if masters else piece.values
            grad = piece.grad.to(master.dtype) * grad_scale
            self._adamw([master], [grad], [exp_avg], [exp_avg_sq], lr=lr, weight_decay=piece.weight_decay)
            piece.values.copy_(master)

        compute_on_device([piece.states for piece in pieces], update, offload)

    def _pieces(self) -> Iterator[_Piece]:
        for name, param in self.owned:
            states = self.states[name]
            visiting = [tensor for kind, tensor in states.items() if kind != "master" or not _is_its_own_master(param)]
            count = _elements_of_piece(states["exp_avg"])
            flat = [tensor.view(-1).split(count) for tensor in (param.data, param.main_grad, *visiting)]
            for values, grad, *parts in zip(*flat, strict=True):
                yield _Piece(values=values, grad=grad, states=tuple(parts), weight_decay=self._decay(param))

    def _adamw(
        self, masters: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], *,
        lr: float, weight_decay: float,
    ) -> None:  # fmt: skip
        """torch.optim.AdamW's update, in place."""
        on_gpu = self.layout.device.type == "cuda"
        done = torch.full((len(masters),), float(self.num_updates), dtype=torch.float32, device=self.layout.device)
        adamw(
            masters, grads, exp_avgs, exp_avg_sqs, [], list(done.unbind()), fused=on_gpu, foreach=not on_gpu,
            amsgrad=False, beta1=self.betas[0], beta2=self.betas[1], lr=lr, weight_decay=weight_decay, eps=self.eps,
            maximize=False,
        )  # fmt: skip


def _batches(
    named: Sequence[tuple[str, nn.Parameter]], *, most_elements: int
) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Parameters one after the other, as many at a time as have so many elements; at least one."""
    batch: list[tuple[str, nn.Parameter]] = []
    held = 0
    for name, param in named:
        if batch and held + param.numel() > most_elements:
            yield batch
            batch, held = [], 0
        batch.append((name, param))
        held += param.numel()
    if batch:
        yield batch


def _is_its_own_master(param: Tensor) -> bool:
    return param.dtype.itemsize >= 4


def _elements_of_piece(tensor: Tensor) -> int:
    return host_tensors.PIECE_BYTES // tensor.itemsize
