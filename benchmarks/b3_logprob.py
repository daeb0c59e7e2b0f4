"""B3: log-probability and entropy of response tokens from hidden states, and the backward, beside its alternatives.

One GPU, bf16, 8192 rows of width 3584 against a head of 152,064 rows. Each candidate is checked before anything is
timed: against float64 on a small shape and against float32 on the real one. Then all are timed in turns, forward and
forward + backward (gradient of the sum of the log-probabilities). Writes b3_logprob.json and .png to FOLDER.

    python benchmarks/b3_logprob.py FOLDER [--sweep] [--phases]       # --plot-only draws again from the JSON

Extra memory is the peak beyond inputs, gradients and results. TFLOP/s count the work that has to be done (1 product
forward, 3 with the backward), whether or not a candidate makes the logits twice. Candidates are what is installed: of
liger-kernel and cut-cross-entropy (Apple's CCE) each says why it is absent when it is. verl's form is written out here:
its package would bring a whole trainer.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megalong_kernels import logprob as kernels
from steps import machine
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megalong.objectives.logprobs import vocab_parallel_logprobs

Candidate = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]
"""(hidden_RD, weight_VD, targets_R) -> logprobs_R and, where it has one, entropy_R; or the sum of logprobs, []."""
LIGER = "liger"
CHUNK = 1024  # rows a checkpointed chunk of eager PyTorch holds
VERL_CHUNK = 512  # verl's default


def ours(backend: str) -> Candidate:
    def run(hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor) -> tuple[Tensor, ...]:
        return vocab_parallel_logprobs(
            hidden_RD, weight_VD, targets_R, group=dist.group.WORLD, real_vocab=len(weight_VD), backend=backend
        )

    return run


def eager(hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
    logprobs_RV = (hidden_RD @ weight_VD.t()).float().log_softmax(-1)
    with torch.no_grad():
        entropy_R = -(logprobs_RV.exp() * logprobs_RV).sum(-1)
    return logprobs_RV.gather(1, targets_R[:, None])[:, 0], entropy_R


def eager_chunked(hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
    parts = [
        checkpoint(eager, hidden, weight_VD, targets, use_reentrant=False)
        for hidden, targets in zip(hidden_RD.split(CHUNK), targets_R.split(CHUNK), strict=True)
    ]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


class VerlChunks(torch.autograd.Function):
    """The form of verl's FusedLinearForPPO: eager in chunks; the backward makes the softmax of each again.

    A checkpoint makes the entropy again, too. verl's own rounds its results to bf16.
    """

    @staticmethod
    def forward(ctx: Any, hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden_RD, weight_VD, targets_R)
        chunks = zip(hidden_RD.split(VERL_CHUNK), targets_R.split(VERL_CHUNK), strict=True)
        parts = [eager(hidden_CD, weight_VD, targets_C) for hidden_CD, targets_C in chunks]
        logprobs_R, entropy_R = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.mark_non_differentiable(entropy_R)
        return logprobs_R, entropy_R

    @staticmethod
    def backward(ctx: Any, grad_R: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden_RD, weight_VD, targets_R = ctx.saved_tensors
        grad_RD, grad_VD = torch.empty_like(hidden_RD), torch.zeros_like(weight_VD)
        chunks = zip(*(part.split(VERL_CHUNK) for part in (grad_RD, hidden_RD, targets_R, grad_R)), strict=True)
        for grad_CD, hidden_CD, targets_C, grad_C in chunks:
            grad_CV = (hidden_CD @ weight_VD.t()).float().softmax(-1).neg_()
            grad_CV[torch.arange(len(targets_C), device=targets_C.device), targets_C] += 1
            grad_CV = (grad_CV * grad_C[:, None]).to(hidden_CD.dtype)
            torch.mm(grad_CV, weight_VD, out=grad_CD)
            grad_VD += grad_CV.t() @ hidden_CD
        return grad_RD, grad_VD, None


def cut_cross_entropy() -> Candidate:
    """Apple's, in Triton: no entropy. Blocks of logits whose gradients all are small are left out of the backward."""
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden_RD, weight_VD, targets_R: (
        -linear_cross_entropy(hidden_RD, weight_VD, targets_R, reduction="none"),
    )


def liger_scaled_ce() -> Candidate:
    """Per-token loss and entropy: on Hopper the CuTe kernels, which need nvidia-cutlass-dsl."""
    from liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90 import LigerFusedScaledCrossEntropySM90Function

    def run(hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
        nll_R, entropy_R = LigerFusedScaledCrossEntropySM90Function.apply(
            hidden_RD, weight_VD, targets_R, 1.0, -100, 1, True
        )
        return -nll_R, entropy_R.detach().float()

    return run


def liger_scaled_ce_chunked() -> Candidate:
    """The same op where the CuTe kernels are not: chunks of 512 rows in PyTorch."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import _FusedLinearPPOFallbackFunction

    def run(hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
        nll_R, entropy_R = _FusedLinearPPOFallbackFunction.apply(hidden_RD, weight_VD, targets_R, 1.0, -100, True)
        return -nll_R, entropy_R.detach().float()

    return run


def liger_cross_entropy() -> Candidate:
    """Fused linear cross-entropy in Triton: the sum alone, its gradients made in the forward."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda hidden_RD, weight_VD, targets_R: (-loss(weight_VD, hidden_RD, targets_R),)


def liger_grpo() -> Candidate:
    """Fused linear GRPO loss with ratio 1 and advantage 1, whose gradient is that of the mean log-probability."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="grpo", compiled=True)

    def run(hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor) -> tuple[Tensor, ...]:
        responses = 8
        targets, mask = targets_R.view(responses, -1), torch.ones_like(targets_R).view(responses, -1)
        hidden = hidden_RD.view(responses, -1, hidden_RD.shape[-1])
        value = loss(hidden, weight_VD, targets, mask, torch.ones(responses, device=hidden.device))[0]
        return (-value * len(targets_R),)

    return run


OPTIONAL = {
    f"{LIGER} scaled CE, CuTe SM90": liger_scaled_ce,
    f"{LIGER} scaled CE, chunked": liger_scaled_ce_chunked,
    f"{LIGER} cross-entropy": liger_cross_entropy,
    f"{LIGER} GRPO": liger_grpo,
    "cut cross-entropy": cut_cross_entropy,
}
"""Of packages that may be absent, or may not run with the torch and Triton that are here."""


def inputs(rows: int, width: int, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    hidden_RD = torch.randn(rows, width, device="cuda", generator=generator).bfloat16().requires_grad_()
    # Logits of standard deviation 2.5: an entropy of some nats, as a trained head has, not a flat softmax.
    weight_VD = torch.randn(vocab, width, device="cuda", generator=generator) * (2.5 / width**0.5)
    targets_R = torch.randint(0, vocab, (rows,), device="cuda", generator=generator)
    return hidden_RD, weight_VD.bfloat16().requires_grad_(), targets_R


def results(run: Candidate, parts: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """What a candidate returns and its gradients for the sum of log-probabilities."""
    out = run(*parts)
    found = dict(zip(("grad_hidden", "grad_weight"), torch.autograd.grad(out[0].sum(), parts[:2]), strict=True))
    if out[0].ndim:
        found["logprob"] = out[0].detach()
    if len(out) > 1:
        found["entropy"] = out[1]
    return found


def errors(run: Candidate, parts: tuple[Tensor, ...], want: dict[str, Tensor]) -> dict[str, float]:
    """Largest absolute error of the values, error of the gradients relative to their norm."""
    return {
        name: (
            (found.to(want[name].dtype) - want[name]).norm() / want[name].norm()
            if name.startswith("grad")
            else (found - want[name]).abs().max()
        ).item()
        for name, found in results(run, parts).items()
    }


def reference(parts: tuple[Tensor, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    exact = [part.detach().to(dtype).requires_grad_() for part in parts[:2]]
    return results(ours("plain"), (*exact, parts[2]))


def check(candidates: dict[str, Candidate], shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Errors of all candidates; those that cannot run at all are taken out, ours must be no worse than eager."""
    parts = inputs(*shape)
    want, found = reference(parts, dtype), {}
    for name, run in list(candidates.items()):
        try:
            found[name] = errors(run, parts, want)
        except Exception as error:  # a baseline's own failure is a result: it is printed and left out of the timing
            if name not in OPTIONAL:
                raise
            print(f"{name}: cannot run: {type(error).__name__}: {str(error)[:300]}", flush=True)
            del candidates[name]
            continue
        values = ", ".join(f"{key} {value:.1e}" for key, value in found[name].items())
        print(f"{shape} {name}: error against {dtype}: {values}", flush=True)
    for key, value in found["ours"].items():
        if not value <= 1.1 * found["eager"][key] + 1e-6:
            raise SystemExit(f"ours: error of {key} {value:.2e} is above eager's {found['eager'][key]:.2e} at {shape}")
    return found


def forward(run: Candidate, parts: tuple[Tensor, ...]) -> None:
    """Where no gradient is wanted: the pass of a reference policy."""
    with torch.no_grad():
        run(*(part.detach() for part in parts))


def both(run: Candidate, parts: tuple[Tensor, ...]) -> None:
    torch.autograd.grad(run(*parts)[0].sum(), parts[:2])


def milliseconds(work: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def extra_gb(work: Callable[[], object], *, results_bytes: int) -> float:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - held - results_bytes) / 1e9


def measure(candidates: dict[str, Candidate], parts: tuple[Tensor, ...], repeats: int) -> list[dict[str, object]]:
    hidden_RD, weight_VD, _ = parts
    tflop = 2 * hidden_RD.numel() * len(weight_VD) / 1e12
    kinds = {"forward": (forward, 1, 0), "both": (both, 3, hidden_RD.nbytes + weight_VD.nbytes)}
    rows = []
    for kind, (work, products, grad_bytes) in kinds.items():
        for run in candidates.values():
            for _ in range(3):
                work(run, parts)
        times = {name: [] for name in candidates}
        for _ in range(repeats):
            for name, run in candidates.items():
                times[name].append(milliseconds(lambda run=run, work=work: work(run, parts)))
        for name, run in candidates.items():
            median = statistics.median(times[name])
            extra = extra_gb(lambda run=run, work=work: work(run, parts), results_bytes=grad_bytes + 8 * len(hidden_RD))
            rows.append({
                "name": name, "kind": kind, "ms": median, "spread_ms": (min(times[name]), max(times[name])),
                "tflops": products * tflop / median * 1e3, "extra_gb": extra,
            })  # fmt: skip
    return rows


def sweep(parts: tuple[Tensor, ...]) -> list[dict[str, float]]:
    """Time and memory of our steps of other sizes."""
    kept, rows = (kernels.ROW_STEP, kernels.VOCAB_STEP), []
    for row_step, vocab_step in ((8192, 2112), (8192, 4224), (8192, 8448), (8192, 16896), (4096, 8448), (4224, 2048)):
        kernels.ROW_STEP, kernels.VOCAB_STEP = row_step, vocab_step
        row = {"row_step": row_step, "vocab_step": vocab_step}
        for kind, work in (("forward", forward), ("both", both)):
            times = [milliseconds(lambda work=work: work(ours("triton"), parts)) for _ in range(5)]
            row[kind] = statistics.median(times[2:])
        print(
            f"steps of {row_step} x {vocab_step}: forward {row['forward']:.1f}, both {row['both']:.1f} ms", flush=True
        )
        rows.append(row)
    kernels.ROW_STEP, kernels.VOCAB_STEP = kept
    return rows


def phases(parts: tuple[Tensor, ...]) -> dict[str, float]:
    """Milliseconds of each piece of ours, for all steps of the vocabulary together."""
    hidden_RD, weight_VD, targets_R = (part.detach() for part in parts)
    rows, columns = min(len(hidden_RD), kernels.ROW_STEP), min(len(weight_VD), kernels.VOCAB_STEP)
    hidden_RD, weight_CD, targets_R = hidden_RD[:rows], weight_VD[:columns], targets_R[:rows]
    logits_RC = torch.mm(hidden_RD, weight_CD.t(), out_dtype=torch.float32)
    grad_RC, sum_RD = logits_RC.bfloat16(), torch.zeros_like(hidden_RD, dtype=torch.float32)
    grad_CD = torch.empty_like(weight_CD)
    parts_4R = torch.zeros(4, rows, device="cuda")
    pieces = {
        "logits, float32 out": lambda: torch.mm(hidden_RD, weight_CD.t(), out_dtype=torch.float32, out=logits_RC),
        "logits, bfloat16 out (not ours)": lambda: torch.mm(hidden_RD, weight_CD.t(), out=grad_RC),
        "fold": lambda: kernels.fold_chunk(logits_RC, parts_4R, targets_R, first=0, scale=1.0),
        "gradient of logits": lambda: kernels.grad_chunk(
            logits_RC, grad_RC, parts_4R[0], parts_4R[0], targets_R, first=0, scale=1.0
        ),
        "gradient of hidden": lambda: torch.addmm(sum_RD, grad_RC, weight_CD, out_dtype=torch.float32, out=sum_RD),
        "gradient of weight": lambda: torch.mm(grad_RC.t(), hidden_RD, out=grad_CD),
    }
    scale, found = len(weight_VD) / columns * len(parts[0]) / rows, {}
    for name, work in pieces.items():
        found[name] = statistics.median(milliseconds(work) for _ in range(20)) * scale
        print(f"{name}: {found[name]:.2f} ms", flush=True)
    return found


def show(rows: list[dict[str, object]]) -> None:
    best = {
        kind: min((row["ms"] for row in rows if row["kind"] == kind and LIGER in row["name"]), default=None)
        for kind in ("forward", "both")
    }
    of = {(row["name"], row["kind"]): row for row in rows}
    print(f"{'':30} {'pass':8} {'ms':>8} {'spread':>17} {'TFLOP/s':>8} {'extra GB':>9} {'eager/x':>8} {'liger/x':>8}")
    for row in rows:
        low, high = row["spread_ms"]
        against_eager = of["eager", row["kind"]]["ms"] / row["ms"]
        against_liger = f"{best[row['kind']] / row['ms']:8.2f}" if best[row["kind"]] else "       -"
        print(
            f"{row['name']:30} {row['kind']:8} {row['ms']:8.2f} {low:8.2f}-{high:8.2f} {row['tflops']:8.0f} "
            f"{row['extra_gb']:9.3f} {against_eager:8.2f} {against_liger}"
        )
    memory = of["eager", "both"]["extra_gb"] / of["ours", "both"]["extra_gb"]
    print(f"eager's extra memory is {memory:.0f} times ours (forward + backward)")


def plot(found: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["name"] for row in found["rows"]))
    of = {(row["name"], row["kind"]): row for row in found["rows"]}
    figure, (times, memory) = pyplot.subplots(1, 2, figsize=(11, 0.5 * len(names) + 2), sharey=True)
    for offset, (kind, label) in enumerate((("forward", "forward"), ("both", "forward + backward"))):
        places = [index + 0.4 * offset - 0.2 for index in range(len(names))]
        for axis, key in ((times, "ms"), (memory, "extra_gb")):
            bars = axis.barh(places, [of[name, kind][key] for name in names], height=0.38, label=label)
            axis.bar_label(bars, fmt="%.1f" if key == "ms" else "%.2f", padding=3, fontsize=8)
    times.set_yticks(range(len(names)), names)
    times.invert_yaxis()
    times.set_xlabel("ms (median)")
    memory.set_xlabel("extra memory, GB")
    figure.legend(*times.get_legend_handles_labels(), loc="upper right", fontsize=8)
    for axis in (times, memory):
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    rows, width, vocab = found["shape"]
    figure.suptitle(
        f"Log-probability and entropy, {rows} rows x {width}, vocabulary {vocab}, bf16, {found['device']}", x=0.4
    )
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def installed() -> tuple[dict[str, Candidate], dict[str, str]]:
    candidates = {
        "ours": ours("triton"), "eager": eager, "eager chunked": eager_chunked, "verl's form": VerlChunks.apply,
        "ours, plain": ours("plain"),
    }  # fmt: skip
    absent = {}
    for name, make in OPTIONAL.items():
        try:
            candidates[name] = make()
        except ImportError as error:
            absent[name] = f"not installed: {error}"
            print(f"{name}: {absent[name]}", flush=True)
    return candidates, absent


def header(shape: tuple[int, ...], *, absent: dict[str, str]) -> dict[str, Any]:
    """What the file begins with."""
    return {**machine(), "shape": shape, "absent": absent}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--width", type=int, default=3584)
    parser.add_argument("--vocab", type=int, default=152064)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--sweep", action="store_true", help="time our steps of other sizes")
    parser.add_argument("--phases", action="store_true", help="time each piece of ours")
    parser.add_argument("--plot-only", action="store_true")
    args = parser.parse_args()
    file = args.folder / "b3_logprob.json"
    if not args.plot_only:
        args.folder.mkdir(parents=True, exist_ok=True)
        torch.cuda.set_device(0)
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
        torch.backends.cuda.matmul.allow_tf32 = False
        candidates, absent = installed()
        shape = (args.rows, args.width, args.vocab)
        found = header(shape, absent=absent)
        found["errors_small"] = check(candidates, (1024, 1024, 20000), torch.float64)
        found["errors"] = check(candidates, shape, torch.float32)
        parts = inputs(*shape)
        found["phases_ms"] = phases(parts) if args.phases else {}
        found["rows"] = measure(candidates, parts, args.repeats)
        file.write_text(json.dumps(found, indent=2))
        show(found["rows"])
        found["sweep"] = sweep(parts) if args.sweep else []
        file.write_text(json.dumps(found, indent=2))
        dist.destroy_process_group()
    plot(json.loads(file.read_text()), file.with_suffix(".png"))


if __name__ == "__main__":
    main()
