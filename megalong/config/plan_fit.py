"""Whether a planned run fits the GPUs that it is on."""

from __future__ import annotations

from collections.abc import Iterator

from megalong.config.plan import GIB, Plan


def shortages(plan: Plan, *, card: int) -> Iterator[str]:
    """What a run is not expected to have room for on GPUs of `card` bytes. The plan's sums are upper estimates."""
    if plan.memory_total > card:
        yield f"a training process takes up to {plan.memory_total / GIB:.1f} GiB of a GPU's {card / GIB:.1f}"
        return
    if plan.engine is None:
        return
    problems = [plan.engine.problem(placement, card=card) for placement in plan.engine.shares]
    if all(problems):  # the run may yet take any of the placements
        yield f"no room for the vLLM engine on GPUs of {card / GIB:.1f} GiB: {problems[0]}"
