"""B10: what it costs to let kept activations wait in host memory. One GPU.

The LLM part of a GRPO step at 7B width, shared prefix, model.recompute=keep_attention, G=8 responses of 512 tokens,
bf16, forward + backward. The same trainer, with what recomputation keeps (layer inputs, attention outputs and
log-sum-exps)

    kept         on the device
    offload      in pinned host memory as model.offload_activations=true does it, copied beside the compute
    save_on_cpu  in pinned host memory by torch.autograd.graph.save_on_cpu, in the stream of the compute

The optimizer is left out: its states for 28 layers do not fit on one GPU beside what is kept. First, at a small size,
the gradients of each form must be those of `kept`, or nothing is timed; at the timed size the gradient norm must be.

    python benchmarks/b10_offload.py [--prefix 131072] [--layers 28] [--forms kept offload save_on_cpu] [--json FILE]
        [--plot FILE.png] [--tiny]

What is kept of 28 layers at a prefix of 131,072 tokens takes 55 GB of host memory.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from b2_train_step import distance, guarded, our_gradients
from plots import bars
from steps import PEAK, Bench, Case, free, machine, make_folder, parser_of, save
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu

from megalong.config import costs
from megalong.config.tree import Recompute
from megalong.engine import trainer as training
from megalong.engine.optimizer import ShardedAdamW
from megalong.parallel.layout import ParallelLayout, destroy_layout
from megalong.parallel.offload import CudaCopies, Offload

HOW = {"mode": "shared_prefix", "recompute": "keep_attention"}
LARGEST_ERROR = 1e-2
"""Of the gradient in bfloat16, relative: the backward of the attention kernels adds up in any order."""


class SaveOnCpu:
    """torch's save_on_cpu in the place of our Offload: for what autograd saves and for the attention outputs."""

    def __init__(self) -> None:
        self.hooks = save_on_cpu(pin_memory=True)

    def forward(self, _: Callable[[Tensor], bool], *, layers: int) -> AbstractContextManager[None]:
        return save_on_cpu(pin_memory=True)

    def put(self, tensor: Tensor) -> Callable[[], Tensor]:
        return partial(self.hooks.unpack_hook, self.hooks.pack_hook(tensor))


class CpuCopies:
    """Copies in the place of a GPU's, to try the script without one."""

    def to_host(self, tensor: Tensor) -> tuple[list[Tensor], None]:
        return [tensor.clone()], None

    def to_device(self, blocks: Sequence[Tensor], like: Tensor, after: None) -> tuple[Tensor, None]:
        return blocks[0].clone(), None

    def wait(self, event: None) -> None:
        pass


class GradientsAlone(ShardedAdamW):
    """The gradient's norm, and no states."""

    def __init__(
        self, named_parameters: Sequence[tuple[str, nn.Parameter]], layout: ParallelLayout, *,
        counted: frozenset[str], **_: Any,
    ) -> None:  # fmt: skip
        self.named, self.layout, self.counted = list(named_parameters), layout, counted

    def step(self, **_: Any) -> None:
        pass


FORMS: dict[str, Callable[[torch.device], Offload | SaveOnCpu | None]] = {
    "kept": lambda _: None,
    "offload": lambda device: Offload(CudaCopies(device) if device.type == "cuda" else CpuCopies()),
    "save_on_cpu": lambda _: SaveOnCpu(),
}


def make_bench(folder: Path, overrides: Sequence[str]) -> Bench:
    bench = Bench(folder, overrides, vision=False)
    with mock.patch.object(training, "ShardedAdamW", GradientsAlone):
        _ = bench.trainer
    return bench


def use(bench: Bench, form: str) -> None:
    """Let the next steps keep their activations so; gives back the host memory of the form before."""
    bench.trainer.model.llm.offload = FORMS[form](bench.layout.device)
    free(bench.layout.device)
    if bench.layout.device.type == "cuda":
        empty = getattr(torch.accelerator, "empty_host_cache", None) or torch._C._host_emptyCache  # older torch
        empty()


def check(folder: Path, *, case: Case, overrides: Sequence[str], forms: Sequence[str]) -> list[dict[str, Any]]:
    """The gradient's relative difference to `kept`. Raises SystemExit when a form is too far off."""
    bench = make_bench(folder, overrides)
    packs = bench.packs(case, mode=HOW["mode"])
    use(bench, "kept")
    bench.step(packs, **HOW)
    want, rows = our_gradients(bench), []
    for form in forms:
        use(bench, form)
        bench.step(packs, **HOW)
        rows.append({"form": form, "gradient": distance(our_gradients(bench), want)})
        print(f"{form:11} gradient's relative difference to kept {rows[-1]['gradient']:.1e}", flush=True)
    bench.close()
    destroy_layout()
    if not all(row["gradient"] < LARGEST_ERROR for row in rows):
        raise SystemExit(f"a gradient is off by more than {LARGEST_ERROR}; nothing is timed")
    return rows


def time_form(bench: Bench, case: Case, *, repeats: int) -> dict[str, Any]:
    """The fastest step: forward and backward. The first one takes the host memory and is not counted."""
    packs = bench.packs(case, mode=HOW["mode"])
    steps = [bench.step(packs, **HOW) for _ in range(1 + repeats)][1:]
    times = [sum(step["phases"][name] for name in ("prepare", "forward", "backward")) for step in steps]
    return {"seconds": min(times), "all_seconds": times, "grad_norm": steps[-1]["grad_norm"]}


def host_gb(bench: Bench, case: Case) -> float:
    """What the forward of a step keeps."""
    per_token = costs.kept_bytes_per_token(
        bench.shape, recompute=Recompute.keep_attention, tp=1, sequence_parallel=False, element=2
    )
    return per_token * bench.shape.layers * costs.shared_tokens(case.text, case.response, case.group) / 1e9


def line(row: dict[str, Any]) -> str:
    text = f"P={row['prefix']:,}, {row['layers']} layers, {row['kept_gb']:.1f} GB kept, {row['form']:11} "
    if row["status"] != "measured":
        return text + row["status"]
    text += f"{row['seconds']:8.3f} s, peak {row['peak_gb']:.1f} GB, MFU {row['mfu']:.0%}, "
    text += f"gradient norm {row['grad_norm']:.5g}"
    return text + (f", {row['slower']:+.1%} against kept" if "slower" in row else "")


def main(argv: Sequence[str] | None = None) -> None:
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    parser = parser_of(__doc__)
    parser.add_argument("--prefix", type=int, help="131072; 96 with --tiny")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--repeats", type=int, default=2, help="steps that are timed, after one that is not")
    parser.add_argument("--plot", help="file for the plot")
    args = parser.parse_args(argv)
    case = Case(
        frames=0, text=args.prefix or (96 if args.tiny else 131_072), group=args.responses,
        response=args.length or (8 if args.tiny else 512),
    )  # fmt: skip
    small = Case(frames=0, text=40 if args.tiny else 4096, group=4, response=7 if args.tiny else 200)
    layers, rows = args.layers or (4 if args.tiny else 28), []
    with tempfile.TemporaryDirectory() as scratch:
        # More layers than stay on the device.
        folder = make_folder(Path(scratch) / "check", layers=4, tiny=args.tiny)
        checks = check(folder, case=small, overrides=args.overrides, forms=args.forms)
        bench = make_bench(make_folder(Path(scratch) / "timed", layers=layers, tiny=args.tiny), args.overrides)
        for form in args.forms:
            use(bench, form)
            row = {"form": form, "prefix": case.text, "layers": layers, "kept_gb": host_gb(bench, case)}
            row |= guarded(bench, partial(time_form, bench, case, repeats=args.repeats))
            if "seconds" in row:
                row["mfu"] = bench.flops(case, mode=HOW["mode"], recompute="none") / row["seconds"] / PEAK
            kept = [other for other in rows if other["form"] == "kept" and "seconds" in other]
            if kept and "seconds" in row:
                row["slower"] = row["seconds"] / kept[0]["seconds"] - 1
            rows.append(row)
            print(line(row), flush=True)
        bench.close()
        destroy_layout()
    save(args.json, [*checks, *rows])
    if args.plot:
        measured = [row for row in rows if "seconds" in row]
        groups = {
            "seconds": {row["form"]: row["seconds"] for row in measured},
            "peak GB": {row["form"]: row["peak_gb"] for row in measured},
        }
        title = f"Kept activations: P={case.text:,}, {layers} layers, {machine()['device']}"
        bars(groups, path=args.plot, unit="seconds; GB", title=title)
    norms = [row["grad_norm"] for row in rows if "grad_norm" in row]
    if norms and max(norms) > (1 + LARGEST_ERROR) * min(norms):
        raise SystemExit(f"gradient norms at the timed size differ: {norms}")


if __name__ == "__main__":
    main()
