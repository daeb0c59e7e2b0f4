"""AdamW with states in host memory: equal bits to torch.optim.AdamW, whatever the copies take and wherever they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from host_copies import EarlyCopies, LateCopies
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor, nn

from megalong.engine import optimizer
from megalong.engine.optimizer import KINDS, ShardedAdamW
from megalong.parallel import host_tensors
from megalong.parallel.host_tensors import compute_on_device

SHAPES = {"table": (61, 23), "norm": (7,), "cube": (4, 5, 6), "one": (1,), "piece": (8, 8)}
PIECE_BYTES = 256
BETAS, EPS, DECAY = (0.9, 0.99), 1e-6, 0.1
STEPS = [(1e-2, 1.0), (3e-3, 0.37), (2e-2, 0.9)]
"""Learning rate and factor of the gradients."""
COPIES: dict[str, Callable[[], LateCopies | None]] = {"none": lambda: None, "early": EarlyCopies, "late": LateCopies}
DTYPES = [torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_tensors, "PIECE_BYTES", PIECE_BYTES)


def make_adam(layout: object, dtype: torch.dtype, copies: LateCopies | None) -> ShardedAdamW:
    generator = torch.Generator().manual_seed(1)
    named = [(name, nn.Parameter(torch.randn(shape, generator=generator).to(dtype))) for name, shape in SHAPES.items()]
    for _, param in named:
        param.main_grad = torch.zeros(param.shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return ShardedAdamW(
        named, layout, counted=frozenset(SHAPES), betas=BETAS, eps=EPS, weight_decay=DECAY, offload=copies
    )


def take_steps(adam: ShardedAdamW, steps: Sequence[int]) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for _, param in adam.named:
            param.main_grad.copy_(torch.randn(param.shape, generator=generator))
        lr, scale = STEPS[step]
        adam.step(lr=lr, grad_scale=scale)


def everything(adam: ShardedAdamW) -> dict[str, Tensor]:
    states = {f"{kind}.{name}": tensor for name, of in adam.states.items() for kind, tensor in of.items()}
    return {**states, **{name: param.data for name, param in adam.named}}


def torch_adamw(layout: object, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same steps by torch.optim.AdamW on whole float32 or wider copies."""
    named = [(name, param.data) for name, param in make_adam(layout, dtype, None).named]
    masters = [tensor.clone() if dtype.itemsize >= 4 else tensor.float() for _, tensor in named]
    groups = [
        {"params": [master for master in masters if master.ndim > 1], "weight_decay": DECAY},
        {"params": [master for master in masters if master.ndim == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, betas=BETAS, eps=EPS, foreach=True)
    for step, (lr, scale) in enumerate(STEPS):
        generator = torch.Generator().manual_seed(step)
        for master in masters:
            master.grad = torch.randn(master.shape, generator=generator).to(master.dtype) * scale
        for group in adam.param_groups:
            group["lr"] = lr
        adam.step()
    done = {}
    for (name, _), master in zip(named, masters, strict=True):
        done[name], done[f"master.{name}"] = master.to(dtype), master
        done |= {f"{kind}.{name}": adam.state[master][kind] for kind in KINDS[1:]}
    return done


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("copies", COPIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_updates_are_those_of_torch(layout: object, dtype: torch.dtype, copies: str) -> None:
    adam = make_adam(layout, dtype, COPIES[copies]())
    take_steps(adam, range(len(STEPS)))
    assert_same(everything(adam), torch_adamw(layout, dtype))


@pytest.mark.parametrize("most_bytes", [4, 600, 1 << 30])
def test_an_update_takes_a_few_parameters_at_a_time(
    layout: object, most_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer, "UPDATE_BYTES", most_bytes)
    adam = make_adam(layout, torch.bfloat16, None)
    update, together = adam._adamw, []

    def watched(masters: list[Tensor], grads: list[Tensor], *moments: list[Tensor], **how: float) -> None:
        together.append([grad.nbytes for grad in grads])
        update(masters, grads, *moments, **how)

    monkeypatch.setattr(adam, "_adamw", watched)
    take_steps(adam, range(len(STEPS)))
    assert_same(everything(adam), torch_adamw(layout, torch.bfloat16))
    assert all(len(sizes) == 1 or sum(sizes) <= most_bytes for sizes in together)
    assert sum(map(sum, together)) == 4 * len(STEPS) * sum(param.numel() for _, param in adam.named)
    assert (max(map(len, together)) > 1) is (most_bytes > 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_visits_is_bounded_and_goes_there_and_back_once(layout: object, dtype: torch.dtype) -> None:
    copies = LateCopies()
    adam = make_adam(layout, dtype, copies)
    take_steps(adam, [0])
    kinds = 3 if dtype == torch.bfloat16 else 2  # a float32 or wider parameter, its own master, is there already
    params = sum(param.numel() for _, param in adam.named)
    assert [len(buffer) for buffer in copies.buffers] == [PIECE_BYTES] * 3 * kinds
    assert copies.moved == [kinds * params * max(4, dtype.itemsize)] * 2
    for name, param in adam.named:
        assert (adam.states[name]["master"].data_ptr() == param.data_ptr()) is (kinds == 2)


@pytest.mark.parametrize(("saved", "loaded"), [("late", "none"), ("none", "late"), ("late", "early")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_states_move_between_host_and_device(layout: object, dtype: torch.dtype, saved: str, loaded: str) -> None:
    first, second = (make_adam(layout, dtype, COPIES[name]()) for name in (saved, loaded))
    take_steps(first, [0])
    like = {
        name: ShardedTensor.from_rank_offsets(name, param.data, replica_id=(0, 0, 0)) for name, param in first.named
    }
    described = first.sharded_state(like)
    assert {entry.dtype for entry in described.values()} == {torch.float64 if dtype == torch.float64 else torch.float32}
    second.load_sharded_state({name: entry.data for name, entry in described.items()}, num_updates=1)
    for (_, param), (_, other) in zip(second.named, first.named, strict=True):
        param.data.copy_(other.data)
    for adam in (first, second):
        take_steps(adam, [1, 2])
    assert_same(everything(second), everything(first))


@pytest.mark.parametrize("copies", COPIES)
def test_masters_are_taken_from_weights_loaded_from_elsewhere(layout: object, copies: str) -> None:
    adam = make_adam(layout, torch.bfloat16, COPIES[copies]())
    for _, param in adam.named:
        param.data.mul_(3)
    adam.refresh_masters()
    for name, param in adam.named:
        assert torch.equal(adam.states[name]["master"], param.data.float())


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 20])
def test_every_piece_is_computed_on_once_and_in_turn(count: int) -> None:
    for copies in (EarlyCopies(), LateCopies()):
        hosts = [torch.full((1 + index % 3,), float(index)) for index in range(count)]
        seen = []

        def double(index: int, visitors: Sequence[Tensor], seen: list = seen) -> None:
            seen.append((index, visitors[0].tolist()))
            visitors[0].mul_(2)

        compute_on_device([(host,) for host in hosts], double, copies)
        assert seen == [(index, [float(index)] * (1 + index % 3)) for index in range(count)]
        assert [host.tolist() for host in hosts] == [[2.0 * index] * (1 + index % 3) for index in range(count)]


def test_an_error_in_between_waits_for_the_copies_under_way() -> None:
    copies, hosts = LateCopies(), [torch.ones(2) for _ in range(5)]

    def fail(index: int, visitors: Sequence[Tensor]) -> None:
        visitors[0].mul_(2)
        if index == 1:
            raise ValueError("bad piece")

    with pytest.raises(ValueError, match="bad piece"):
        compute_on_device([(host,) for host in hosts], fail, copies)
    assert [host.tolist() for host in hosts] == [[2.0, 2.0], *[[1.0, 1.0]] * 4]
    assert copies.moved == [4 * 8, 8]
