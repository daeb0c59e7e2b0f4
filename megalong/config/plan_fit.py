"""Whether a planned run fits the GPUs that it is on, and the stores that it was given."""

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


def host_shortages(plan: Plan) -> Iterator[str]:
    """What the videos of a step are not expected to have room for in a process's stores, and what to change."""
    videos = plan.videos
    if videos is None:
        return
    one = "a video takes" if videos.host_store else "a step's videos take"  # frames of a frozen tower: one at a time
    for whose, what, needed, allowed, fits, settings in (
        ("a step's videos take", "embeddings", videos.step_store, videos.host_store + videos.gpu_store,
         videos.store_fits, "video.cache_gib or video.cache_gpu_gib"),
        (one, "decoded frames", videos.least_frames, videos.frame_store, videos.frames_fit, "video.frame_cache_gib"),
    ):  # fmt: skip
        if not fits:
            yield (
                f"{whose} up to {needed / GIB:.3f} GiB of a process's store of {what}, which has "
                f"{allowed / GIB:.3f}; raise {settings}, or lower the batch size or the frames of a video"
            )
