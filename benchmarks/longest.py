"""The longest video: real training steps of the 28-layer 7B on 4 GPUs at 3,600 frames and more.

One step of one group (frames x 257 tokens and 256 of text, G=8 responses of 512): vision encoding, forward, backward,
optimizer. Seconds by phase and the peak of every GPU for each length of --frames, in ascending order; those behind the
first that is out of memory are not run. A step of more than 25 s runs once, after a short one.

--rehearse says in seconds what fits: attention allocates what flash kernels do and computes nothing, so that time grows
with the length and not with its square. Its rows have the peak of every GPU and no seconds.

    python benchmarks/longest.py [--frames 3600] [--modes shared_prefix] [--gpus 4] [--tp 4]
        [--recompute keep_attention] [--rehearse] [--overrides model.mlp_chunks=16 ..] [--max-seconds 500] [--tiny]
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from figure1 import MODES
from sessions import drive, timing_options, video_session, work
from steps import PEAK
from torch import Tensor

from megalong.attention.kernels import KERNELS, KernelEntry

RATE = 450e12


class EmptyKernel:
    """A Kernel that allocates what a flash kernel does, float32 sums of its backward included, and computes nothing."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(query), query.new_zeros(query.shape[:3], dtype=torch.float32)

    def backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, **how: Any
    ) -> tuple[Tensor, ...]:
        sums = [torch.zeros_like(item, dtype=torch.float32) for item in (query, key, value)]
        return tuple(item.to(query.dtype) for item in sums)


def line(row: dict[str, Any]) -> str:
    text = f"{row['name']}, {row['world']} GPUs: "
    if row["status"] != "measured":
        return text + row["status"]
    phases = ", ".join(f"{name} {value:.2f}" for name, value in row["phases"].items())
    peaks = ", ".join(f"{peak:.1f}" for peak in row["peak_gb"])
    if row["rehearsal"]:
        return f"{text}rehearsed, peak GB by rank {peaks}; {row['recompute']}"
    share = row["model_flops"] / (row["phases"]["forward"] + row["phases"]["backward"]) / row["world"] / PEAK
    return (
        f"{text}{row['seconds']:.2f} s ({phases}), MFU of forward and backward {share:.0%}, peak GB by rank {peaks}; "
        f"{row['recompute']}, gradient norm {row['grad_norm']:.4g}, mean -logprob {row['mean_nll']:.4f}"
    )


def session_of(args: Any) -> dict[str, Any]:
    points = [
        {
            "name": f"{mode}, {size} frames",
            "series": mode,
            "size": size,
            "mode": mode,
            "recompute": args.recompute,
            "rehearsal": args.rehearse,
        }
        for mode in args.modes
        for size in sorted(args.frames or ([4, 12] if args.tiny else [3600]))
    ]
    session = video_session(args, points, rate=RATE)
    session["overrides"] += ["model.attention=plain"] if args.rehearse else []
    return session


def use_kernels_of(session: dict[str, Any]) -> None:
    """In this process."""
    if session["points"][0]["rehearsal"]:
        KERNELS["plain"] = KernelEntry(make=EmptyKernel, device="any", dtypes=(torch.bfloat16,))


def main(argv: Sequence[str] | None = None) -> None:
    parser = timing_options(__doc__)
    parser.set_defaults(max_seconds=500.0)
    parser.add_argument("--gpus", type=int, default=4, help="processes: one replica")
    parser.add_argument("--tp", type=int, default=4, help="tensor parallelism (with sequence parallelism), the rest cp")
    parser.add_argument("--cp-a2a", type=int, default=0)
    parser.add_argument("--frames", type=int, nargs="+", help="3600; 4 12 with --tiny")
    parser.add_argument("--modes", nargs="+", default=["shared_prefix"], choices=MODES)
    parser.add_argument("--recompute", default="keep_attention", choices=["keep_attention", "full"])
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args(argv)
    if args.worker:
        session = json.loads(Path(args.worker).read_text())
        use_kernels_of(session)
        work(session, line)
        return
    session = session_of(args)
    use_kernels_of(session)  # a lone process works here
    drive([session], args, script=__file__, line=line)


if __name__ == "__main__":
    main()
