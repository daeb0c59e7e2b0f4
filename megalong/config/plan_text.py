"""The plan as text: resolved configuration, layout, lengths, memory against two cards, FLOPs."""

from __future__ import annotations

from megalong.config.plan import Layout, Plan
from megalong.config.plan_engine import EnginePlan
from megalong.config.plan_videos import GIB, VideoPlan
from megalong.config.tree import EnginePlacement
from megalong.config.validate import TRAINING, Task

BUDGETS_GIB = {"80 GB (A100, H100)": 79, "141 GB (H200)": 139}
"""What a card of that name leaves to a process."""
PEAKS = {"A100": 312e12, "H100, H200": 989e12}
"""FLOP/s of dense bfloat16 products, by the makers' data sheets."""


def render(plan: Plan) -> str:
    """All sections."""
    return "\n\n".join(
        [
            f"# configuration\n{plan.config_text.rstrip()}",
            *([f"# note\n{plan.note}"] if plan.note else []),
            _layout_text(plan.layout),
            _lengths_text(plan),
            _memory_text(plan),
            *([_engine_text(plan.engine, plan.videos)] if plan.engine else []),
            *(_videos_text(plan.videos, plan.layout, plan.task) if plan.videos else []),
            *([_flops_text(plan)] if plan.flops else []),
        ]
    )


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    value_width = max(len(value) for _, value in rows)
    return "\n".join([f"# {title}", *(f"{name:<{width}}  {value:>{value_width}}" for name, value in rows)])


def _layout_text(layout: Layout) -> str:
    rows = [("processes", layout.world_size), ("replicas (dp)", layout.dp), ("ranks per replica", layout.replica)]
    rows += [("tensor (tp)", layout.tp), ("context (cp)", layout.cp), ("pipeline (pp)", layout.pp)]
    if layout.cp > 1:
        rows[-1:-1] = [("- all-to-all, heads for rows", layout.a2a), ("- ring, keys gathered", layout.ring)]
    text = [(name, str(value)) for name, value in rows]
    return _table("parallel layout", [*text, ("sequence parallel", "on" if layout.sequence_parallel else "off")])


def _lengths_text(plan: Plan) -> str:
    lengths = plan.lengths
    rows = []
    if lengths.frames:
        rows += [("frames per video", f"{lengths.frames:,}"), ("tokens per frame", f"{lengths.tokens_per_frame:,}")]
    if plan.task == "cache-embeddings":
        return _table("lengths", rows)
    rows += [
        ("tokens per prompt", f"{lengths.prompt:,}"),
        ("tokens per response, at most", f"{lengths.response:,}"),
    ]
    if lengths.group > 1:
        rows += [
            (f"tokens per group of {lengths.group}, prompt shared", f"{lengths.shared:,}"),
            (f"tokens per group of {lengths.group}, prompt repeated", f"{lengths.repeated:,}"),
            ("repeating would cost", f"{lengths.repeated / lengths.shared:.2f} x the tokens"),
        ]
    what = "sequence(s)" if lengths.repeats else "group(s)"
    rows.append((f"tokens per pack, at most ({lengths.copies_per_pack} of the longest {what})", f"{lengths.pack:,}"))
    if not lengths.sharded and plan.layout.cp > 1:
        rows.append(("which one context-parallel rank has", "whole"))
    return _table("lengths", rows)


def _memory_text(plan: Plan) -> str:
    where = "GPU" if _on_gpus(plan) else "CPU process"
    rows = [(name, f"{value / GIB:,.2f} GiB") for name, value in plan.memory.items()]
    rows.append((f"total per {where}", f"{plan.memory_total / GIB:,.2f} GiB"))
    if len(plan.stages) > 1:
        rows += [(f"total on pipeline stage {n}", f"{total / GIB:,.2f} GiB") for n, total in enumerate(plan.stages)]
    fits = {card: plan.memory_total <= budget * GIB for card, budget in BUDGETS_GIB.items() if _on_gpus(plan)}
    rows += [(f"on {card}", f"{_verdict(fits=fits[card])} {BUDGETS_GIB[card]} GiB") for card in fits]
    if plan.host_activations:
        rows.append(
            ("offloaded activations, pinned host memory per process", f"{plan.host_activations / GIB:,.2f} GiB")
        )
    if plan.host_states:
        rows.append(
            ("offloaded optimizer states, pinned host memory per process", f"{plan.host_states / GIB:,.2f} GiB")
        )
    table = _table(f"memory per {where} (activations: upper estimate)", rows)
    return table if all(fits.values()) else f"{table}\ndocs/memory.md lists the settings that lower it, cheapest first"


def _on_gpus(plan: Plan) -> bool:
    return any(name.startswith("runtime") for name in plan.memory)


def _engine_text(engine: EnginePlan, videos: VideoPlan | None) -> str:
    rows = [(name, f"{value / GIB:,.2f} GiB") for name, value in engine.memory.items()]
    rows.append(("needed on each of its GPUs", f"{engine.memory_total / GIB:,.2f} GiB"))
    if EnginePlacement.disaggregated in engine.shares:
        more = f"{engine.per_node} engine(s) on {engine.per_node * engine.gpus} GPU(s) behind its training processes'"
        rows.append(("disaggregated: a node has", more))
    if EnginePlacement.colocated in engine.shares:
        of_all = f"{engine.processes // engine.gpus} engine(s) on the {engine.processes} training processes' GPU(s)"
        rows.append(("colocated: all nodes have", of_all))
    if videos:
        rows.append(("embeddings of a replica's prompts, pinned in /dev/shm", f"{videos.handover / GIB:,.2f} GiB"))
    if EnginePlacement.colocated in engine.shares:
        holds = "keeps" if engine.sleeps else "holds at its peak"
        rows.append((f"colocated: the trainer {holds}", f"{engine.trainer / GIB:,.2f} GiB"))
    for placement, share in engine.shares.items():
        for card, budget in BUDGETS_GIB.items():
            problem = engine.problem(placement, card=budget * GIB)
            verdict = f"does NOT fit ({problem})" if problem else "fits"
            rows.append((f"{placement.name} on {card}", f"{share * budget:,.2f} GiB for the engine, {verdict}"))
    return _table(f"vLLM rollout engine of {engine.gpus} GPU(s), per GPU (where vLLM is installed)", rows)


def _videos_text(videos: VideoPlan, layout: Layout, task: Task) -> list[str]:
    """Of the stores of embeddings and of decoded frames."""
    shared = f"every {videos.sharing} samples share" if videos.sharing > 1 else "no two samples share"
    of_step = f"a step's videos per process, if {shared} one"
    if task == "cache-embeddings":
        of_step = "a video"
    share = -(-videos.embeddings // layout.replica)
    rows = [
        ("embeddings of a video", f"{videos.embeddings / GIB:,.3f} GiB"),
        (f"share of each of {layout.replica} rank(s)", f"{share / GIB:,.3f} GiB"),
    ]
    if videos.gpu_store:
        rows.append(("GPU memory per process, at most", f"{videos.gpu_store / GIB:,.2f} GiB"))
    if videos.host_store:
        verdict = _verdict(fits=videos.store_fits)
        rows += [
            ("host memory per process, at most", f"{videos.host_store / GIB:,.2f} GiB"),
            (of_step, f"{videos.step_store / GIB:,.2f} GiB, {verdict}"),
        ]
    if videos.disk_store:
        rows.append(("videos that video.cache_dir_gib has room for", f"{videos.disk_store // videos.embeddings:,}"))
    needed = "a video's, at least" if videos.host_store else of_step
    decoded = [
        ("host memory per process, at most", f"{videos.frame_store / GIB:,.2f} GiB"),
        (needed, f"{videos.least_frames / GIB:,.2f} GiB, {_verdict(fits=videos.frames_fit)}"),
    ]
    if task in TRAINING:
        decoded.append(("a step's, decoded ahead as far as there is room", f"{videos.step_frames / GIB:,.2f} GiB"))
    off = "" if videos.host_store else " (off)"
    return [_table(f"embedding store{off}", rows), _table("decoded frames", decoded)]


def _verdict(*, fits: bool) -> str:
    return "fits" if fits else "does NOT fit"


def _flops_text(plan: Plan) -> str:
    unit, name = (1e15, "PFLOP") if plan.flops_total >= 1e14 else (1e9, "GFLOP")
    rows = [(part, f"{value / unit:,.2f} {name}") for part, value in plan.flops.items()]
    rows.append(("total", f"{plan.flops_total / unit:,.2f} {name}"))
    if plan.lengths.group > 1 and plan.task != "eval" and not plan.lengths.repeats:
        more = plan.flops_repeated / plan.flops_total
        rows.append(("total with repeated prompts", f"{plan.flops_repeated / unit:,.2f} {name} ({more:.2f} x)"))
    rows += _times(plan) if _on_gpus(plan) else []
    longest = "longest prompts and responses"
    per = {"eval": f"sample, {longest}", "cache-embeddings": "longest video"}
    title = f"FLOPs per {per.get(plan.task, f'step of {plan.batch_size} prompt(s), {longest}')}"
    return _table(title, rows)


def _times(plan: Plan) -> list[tuple[str, str]]:
    """Seconds that no GPU of a kind can do it faster in, and which part is over parallel.timeout_minutes even then."""
    rows, gpus = [], plan.layout.world_size
    longest = max(plan.flops, key=lambda part: plan.flops[part])
    for card, peak in PEAKS.items():
        text = f"{plan.flops_total / (gpus * peak):,.1f} s"
        minutes = plan.flops[longest] / (gpus * peak) / 60
        if 0 < plan.timeout_minutes < minutes:
            text += f" ({longest}: {minutes:.0f} min, over parallel.timeout_minutes={plan.timeout_minutes:g}; raise it)"
        rows.append((f"at the peak of {gpus} x {card}", text))
    return rows
