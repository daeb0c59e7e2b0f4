"""Figure 1: seconds of a training step against frames, for the four values of mr_sp.mode.

A step is vision encoding, forward, backward and optimizer of one group: 257 tokens a frame and 256 of text, G=8
responses of 512 tokens, 7B with 28 layers, bf16. Tower and projector are frozen.

    none            every response a sequence of its own, whole on one GPU, which encodes its video anew
    stage1          frames shared out over the GPUs and encoded once; sequences whole
    stage1+2        sequences sharded over the GPUs too: the paper's MR-SP
    shared_prefix   one copy of the prompt, sharded over the GPUs

Attention outputs are kept where config.costs estimates that they fit into --memory, and computed again elsewhere; the
rows say which. A point that would take longer than --max-seconds a step, or than what is left of --seconds, is not run:
its row has the estimate, the plot does not.

    python benchmarks/figure1.py [--gpus 4] [--frames 64 128 256 512 1024] [--json FILE] [--plot FILE.png] [--tiny]
    python benchmarks/figure1.py --draw FILE.json [..] --plot FILE.png        # nothing is run
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sessions import drive, timing_options, video_session, work
from steps import machine

MODES = ("shared_prefix", "stage1+2", "stage1", "none")
RATE = 400e12


def line(row: dict[str, Any]) -> str:
    text = f"{row['series']:14} {row['size']:5} frames, {row['world']} GPUs: "
    if row["status"] != "measured":
        return text + row["status"]
    phases = ", ".join(f"{name} {value:.2f}" for name, value in row["phases"].items())
    return (
        f"{text}{row['seconds']:8.2f} s ({phases}); {row['recompute']}, peak {max(row['peak_gb']):.1f} GB, "
        f"gradient norm {row['grad_norm']:.4g}, mean -logprob {row['mean_nll']:.4f}"
    )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: frames down, modes across."""
    found = {(row["size"], row["series"]): row for row in rows}
    modes = [mode for mode in MODES if any(row["series"] == mode for row in rows)]
    lines = [f"| frames | {' | '.join(modes)} |", "|---" * (len(modes) + 1) + "|"]
    for size in sorted({row["size"] for row in rows}):
        cells = []
        for mode in modes:
            row = found.get((size, mode))
            cells.append("-" if row is None else f"{row['seconds']:.2f}" if "seconds" in row else row["status"])
        lines.append(f"| {size} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], *, path: str, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.5))
    for mode in MODES[::-1]:
        measured = sorted((row["size"], row["seconds"]) for row in rows if row["series"] == mode and "seconds" in row)
        if measured:
            axis.plot(*zip(*measured, strict=True), marker="o", label=mode)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    sizes = sorted({row["size"] for row in rows})
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.set_xlabel("frames of the video")
    axis.set_ylabel("seconds per training step")
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3, which="both")
    axis.legend(title="mr_sp.mode")
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def session_of(args: Any) -> dict[str, Any]:
    frames = args.frames or ([4, 8] if args.tiny else [64, 128, 256, 512, 1024])
    points = [
        {
            "name": f"{mode} at {size} frames",
            "series": mode,
            "size": size,
            "mode": mode,
            "memory_gb": args.memory,
        }
        for size in sorted(frames)
        for mode in args.modes
    ]
    return video_session(args, points, rate=RATE)


def main(argv: Sequence[str] | None = None) -> None:
    parser = timing_options(__doc__)
    parser.add_argument("--gpus", type=int, default=4, help="processes: one replica")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--cp-a2a", type=int, default=0)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--frames", type=int, nargs="+")
    parser.add_argument("--memory", type=float, default=125, help="GB of a GPU that the estimate may fill")
    parser.add_argument("--plot", help="file for the plot")
    parser.add_argument("--draw", nargs="+", help="draw the rows of these files; of a point, the last one's")
    args = parser.parse_args(argv)
    if args.worker:
        work(json.loads(Path(args.worker).read_text()), line)
        return
    if args.draw:
        found = [json.loads(Path(path).read_text()) for path in args.draw]
        rows = list({row["name"]: row for part in found for row in part["rows"]}.values())
        device = found[0]["device"]
    else:
        rows = drive([session_of(args)], args, script=__file__, line=line)
        device = machine()["device"]
    print(table(rows), flush=True)
    if args.plot:
        group, response = rows[0]["case"]["group"], rows[0]["case"]["response"]
        draw(rows, path=args.plot, title=f"{rows[0]['world']} x {device}, G={group} responses of {response} tokens")


if __name__ == "__main__":
    main()
