"""B7: the training step over 1, 2 and 4 GPUs: seconds, speedup and whether anything changes.

4 layers of 7B width and the head, bf16, context parallelism (or --tp). Times are of forward + backward and the sums of
gradients over the GPUs; the optimizer is left out.

    shared      one group, P tokens and G=8 responses of 512 (mr_sp.mode=shared_prefix), attention outputs kept
    repeated    the same with every response behind its own prompt (stage1+2, full recomputation), on the most GPUs
    sequence    one sequence of 131,072 tokens, 512 of them a response, full recomputation, on 2 GPUs and on the most
    stock       the same sequence and weights by megatron-core's own GPTModel (stock_megatron.py): Transformer Engine's
                attention, cp by its p2p (a zigzag ring), full recomputation. It computes its last layer on every row,
                ours on those that predict a token

    python benchmarks/b7_scaling.py [--prefix 131072 263168] [--gpus 1 2 4] [--kinds shared sequence stock]
        [--cp-a2a 1] [--json FILE] [--plot FILE.png]
    python benchmarks/b7_scaling.py --gpus 4 --kinds sequence stock [--cp-a2a 1]     # both on rings: ours gathers keys
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import stock_megatron
from plots import bars
from sessions import drive, timing_options, work
from steps import PEAK, machine, parallel_overrides

FORMS = {
    "shared": ("shared_prefix", "keep_attention"),
    "repeated": ("stage1+2", "full"),
    "sequence": ("stage1+2", "full"),
    "stock": ("stage1+2", "full"),
}
RATE = 400e12
COUNTED = ("prepare", "forward", "backward", "gradient sums")


def counted(row: dict[str, Any]) -> float:
    return sum(row["phases"].get(name, 0.0) for name in COUNTED)


def line(row: dict[str, Any]) -> str:
    text = f"{row['name']:42} "
    if row["status"] != "measured":
        return text + row["status"]
    text += f"{counted(row):8.3f} s, peak {max(row['peak_gb']):.1f} GB, mean -logprob {row['mean_nll']:.6f}"
    if row["kind"] == "stock":
        return text
    share = row["model_flops"] / counted(row) / row["world"] / PEAK
    return f"{text}, MFU {share:.0%}, gradient norm {row['grad_norm']:.6g}"


def gap(row: dict[str, Any], other: dict[str, Any]) -> float:
    return stock_megatron.gap(row["logprobs"], other["logprobs"], what=f"{row['name']} and {other['name']}")


def compare(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Each measured row beside the one of its series on the fewest GPUs, and beside the shared step on as many."""
    measured = [row for row in rows if "seconds" in row]
    lines = []
    for row in measured:
        first = min((r for r in measured if r["series"] == row["series"]), key=lambda r: r["world"])
        text = f"{row['name']:42} "
        if row["world"] > first["world"]:
            text += f"{counted(first) / counted(row):.2f} times as fast as on {first['world']}; "
            if row["kind"] != "stock":  # its gradients are not summed over the GPUs
                text += f"gradient norm {abs(row['grad_norm'] / first['grad_norm'] - 1):.1e} off, "
            text += f"log-probabilities {gap(row, first):.1e} off; "
        if row["kind"] == "repeated":
            same = [r for r in measured if (r["kind"], r["case"], r["world"]) == ("shared", row["case"], row["world"])]
            text += "".join(f"{counted(row) / counted(r):.2f} times the shared step; " for r in same)
        if row["kind"] == "sequence":
            same = [r for r in measured if (r["kind"], r["case"], r["world"]) == ("stock", row["case"], row["world"])]
            text += "".join(
                f"{counted(r) / counted(row):.2f} times as fast as stock megatron-core, log-probabilities "
                f"{gap(row, r):.1e} off; "
                for r in same
            )
        lines += [text.rstrip("; ")] if text.endswith("; ") else []
    return lines


def points(args: Any, *, gpus: int) -> list[dict[str, Any]]:
    length = args.length or (8 if args.tiny else 512)
    prefixes = args.prefix or ([48, 96] if args.tiny else [131072, 263168])
    whole = 64 if args.tiny else 131072
    cases = [("shared", prefix, args.responses) for prefix in prefixes]
    if gpus == max(args.gpus):
        cases += [("repeated", prefix, args.responses) for prefix in prefixes]
    if gpus in (2, max(args.gpus)):
        cases.append(("sequence", whole - length, 1))
        # With tensor parallelism its head would have a share of the vocabulary, and of the rows.
        cases += [("stock", whole - length, 1)] if args.tp == 1 else []
    tp = min(args.tp, gpus)
    split = f"tp={tp}, cp={gpus // tp}" + (f", cp_a2a={a2a_of(args, gpus=gpus)}" if args.cp_a2a else "")
    found = []
    for kind, prompt, responses in cases:
        mode, recompute = FORMS[kind]
        series = f"{kind}, P={prompt:,}"
        found.append(
            {
                "name": f"{series}, {gpus} GPUs ({split})",
                "series": series,
                "size": prompt,
                "kind": kind,
                "case": {"frames": 0, "text": prompt, "group": responses, "response": length},
                "mode": mode,
                "recompute": recompute,
                "timed": args.timed,
                "max_seconds": args.max_seconds,
            }
        )
    return [point for point in found if point["kind"] in args.kinds]


def a2a_of(args: Any, *, gpus: int) -> int:
    """The ranks that trade rows for heads, no more than there are: on fewer GPUs the ring is what becomes smaller."""
    return min(args.cp_a2a, gpus // min(args.tp, gpus))


def sessions(args: Any) -> list[dict[str, Any]]:
    """Those of a number of GPUs in processes of their own, stock megatron-core's apart from ours."""
    made = []
    for gpus in args.gpus:
        overrides = parallel_overrides(gpus=gpus, tp=min(args.tp, gpus), cp_a2a=a2a_of(args, gpus=gpus))
        session = {"gpus": gpus, "layers": args.layers or (2 if args.tiny else 4), "tiny": args.tiny, "vision": False}
        session |= {"overrides": [*overrides, *args.overrides], "rate": RATE}
        found = points(args, gpus=gpus)
        made.append({**session, "points": [point for point in found if point["kind"] != "stock"]})
        made += [{**session, "points": [point]} for point in found if point["kind"] == "stock"]
    return [session for session in made if session["points"]]


def work_of(session: dict[str, Any], line: Callable[[dict[str, Any]], str]) -> None:
    (stock_megatron.work if session["points"][0]["kind"] == "stock" else work)(session, line)


def draw(rows: Sequence[dict[str, Any]], *, path: str) -> None:
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if "seconds" in row:
            found.setdefault(row["series"], {})[f"{row['world']} GPU{'s' if row['world'] > 1 else ''}"] = counted(row)
    title = f"Forward and backward, {rows[0]['case']['response']}-token responses, {machine()['device']}"
    bars(found, path=path, unit="seconds", title=title)


def main(argv: Sequence[str] | None = None) -> None:
    parser = timing_options(__doc__)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--prefix", type=int, nargs="+", help="131072 263168; 48 96 with --tiny")
    parser.add_argument("--kinds", nargs="+", default=["shared", "sequence", "stock"], choices=sorted(FORMS))
    parser.add_argument("--tp", type=int, default=1, help="tensor parallelism (with sequence parallelism), the rest cp")
    parser.add_argument(
        "--cp-a2a",
        type=int,
        default=0,
        help="1: a ring that gathers keys; 2 on 4 GPUs: two rings of two; 0: all-to-all",
    )
    parser.add_argument("--plot", help="file for the plot")
    args = parser.parse_args(argv)
    if args.worker:
        work_of(json.loads(Path(args.worker).read_text()), line)
        return
    rows = drive(sessions(args), args, script=__file__, line=line, work_of=work_of)
    print("\n".join(compare(rows)), flush=True)
    if args.plot:
        draw(rows, path=args.plot)


if __name__ == "__main__":
    main()
