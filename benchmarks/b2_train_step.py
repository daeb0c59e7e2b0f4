"""B2, B8 and B13: the LLM part of a GRPO step on one GPU, with the prefix shared and with every response on its own.

4 layers of 7B width and the head, G=8 responses of 512 tokens, bf16, forward + backward (the trainer's own step; the
optimizer's part is left out of the times):

    shared      mr_sp.mode=shared_prefix, model.recompute=keep_attention
    repeated    mr_sp.mode=stage1+2, model.recompute=full: every response behind its own copy of the prompt
    hf          transformers' Qwen2ForCausalLM, SDPA, gradient checkpointing, logits of the response rows, one sequence
                after another; --hf-sequences of them are timed, and the time is scaled to all of them

B8 is the pass without gradients. First, at a small size, each form's log-probabilities and gradients are compared with
those of float32 (B13): shared in float32 must agree to 1e-5, and shared in bfloat16 be at most a twentieth further off
than repeated, in the mean of several draws, or nothing is timed.

    python benchmarks/b2_train_step.py [--prefix 65536 131072] [--json FILE] [--plot FILE.png] [--tiny]
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from plots import bars
from steps import (
    PEAK,
    Bench,
    Case,
    free,
    is_out_of_memory,
    machine,
    make_folder,
    parser_of,
    peak_gb,
    random_tensor,
    reset_peak,
    save,
)
from torch import Tensor
from transformers import PreTrainedModel

from megalong.grpo import tokens_of
from megalong.models.causal_lm import empty_causal_lm
from megalong.parallel.layout import destroy_layout
from megalong.records import PolicyBatch

FORMS = {"shared": ("shared_prefix", "keep_attention"), "repeated": ("stage1+2", "full")}
DRAWS, LARGEST_RATIO = 3, 1.05
"""Draws of tokens and advantages, of which one alone is a hundredth off; and the limit of their mean error's ratio,
which is to be 1."""


@torch.no_grad()
def hf_model(bench: Bench) -> PreTrainedModel:
    """transformers' model with the same weights in bfloat16."""
    device = bench.layout.device
    with torch.device(device):
        model = empty_causal_lm(Path(bench.config.model.path), torch.bfloat16)
    for name, param in model.named_parameters():
        param.copy_(random_tensor(name, param.shape, device=device))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def hf_logprobs(model: PreTrainedModel, batch: PolicyBatch) -> Tensor:
    """[R] float32 of a pack of one sequence."""
    tokens, device = batch.tokens, model.device
    rows = len(tokens.targets_R)
    # The last row predicts nothing: rows + 1 are kept and the last one is dropped.
    logits = model(input_ids=tokens.ids_T[None].to(device), logits_to_keep=rows + 1, use_cache=False).logits[0, :-1]
    return logits.float().log_softmax(-1).gather(1, tokens.targets_R[:, None].to(device))[:, 0]


def hf_step(bench: Bench, model: PreTrainedModel, batches: Sequence[PolicyBatch], *, count: int) -> list[Tensor]:
    """Forward and backward of the first `count` sequences; returns their log-probabilities."""
    model.zero_grad(set_to_none=True)
    loss_of, seen = bench.loss(batches), []
    for index in range(count):
        logprobs_R = hf_logprobs(model, batches[index])
        loss_of(index, logprobs_R, torch.zeros_like(logprobs_R))[0].backward()
        seen.append(logprobs_R.detach())
    return seen


def our_gradients(bench: Bench) -> dict[str, Tensor]:
    """float32 by Hugging Face name, of the last step."""
    found = {}
    parameters = dict(bench.trainer.model.named_parameters())
    for entry in bench.trainer.model.weight_table():
        grad = parameters[entry.megatron].main_grad
        found |= {name: part.clone() for name, part in zip(entry.hf, entry.join([grad]), strict=True)}
    return found


def distance(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Relative error of the whole gradient."""
    wrong = sum((got[name].double() - want[name].double()).square().sum() for name in want)
    return (wrong / sum(part.double().square().sum() for part in want.values())).sqrt().item()


def outcome(bench: Bench, form: str, case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities [R] and gradients of a form."""
    mode, recompute = FORMS[form]
    packs = bench.packs(case, mode=mode)
    bench.step(packs, mode=mode, recompute=recompute)
    return torch.cat(bench.trainer.logprobs(tokens_of(packs), temperature=1.0)), our_gradients(bench)


def check(folder: Path, *, case: Case, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """Errors against float32 of the repeated form, row by row. Raises SystemExit when a form is too far off."""
    exact = Bench(folder, [*overrides, "model.dtype=float32", "model.layer_spec=local"], vision=False)
    cases = [replace(case, seed=seed) for seed in range(1, 1 + DRAWS)]
    wanted = [outcome(exact, "repeated", drawn) for drawn in cases]
    rows = [compare("shared, float32", *outcome(exact, "shared", case), *wanted[0])]
    exact.close()
    destroy_layout()
    half = Bench(folder, overrides, vision=False)
    for form in FORMS:
        for drawn, want in zip(cases, wanted, strict=True):
            rows.append(compare(f"{form}, bfloat16", *outcome(half, form, drawn), *want))
    packs = half.packs(case, mode="stage1+2")
    half.close()
    model = hf_model(half)
    got_R = torch.cat(hf_step(half, model, packs, count=len(packs))).cpu()
    got = {name: param.grad for name, param in model.named_parameters()}
    rows.append(compare("hf, bfloat16", got_R, got, *wanted[0]))
    destroy_layout()
    error = {
        form: statistics.mean(row["gradient"] for row in rows if row["form"] == f"{form}, bfloat16") for form in FORMS
    }
    ratio = error["shared"] / error["repeated"]
    print(f"bfloat16 of {DRAWS} draws: error of shared {ratio:.3f} times that of repeated", flush=True)
    if not (rows[0]["gradient"] <= 1e-5 and ratio <= LARGEST_RATIO):
        raise SystemExit("the shared form is further from float32 than it may be; nothing is timed")
    return rows


def compare(
    form: str, got_R: Tensor, got: dict[str, Tensor], want_R: Tensor, want: dict[str, Tensor]
) -> dict[str, Any]:
    row = {"form": form, "logprob": (got_R.float() - want_R).abs().max().item(), "gradient": distance(got, want)}
    print(
        f"{form:19} against float32, repeated: largest log-probability difference {row['logprob']:.1e}, "
        f"gradient's relative error {row['gradient']:.1e}",
        flush=True,
    )
    return row


def seconds(bench: Bench, run: Callable[[], float | None], *, repeats: int, warm_up: Callable[[], Any]) -> list[float]:
    """Of each repeat; `run` may return the part of it that counts."""
    warm_up()
    bench.watch.enter("")
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        counted = run()
        bench.watch.enter("")  # waits for the device
        times.append(time.perf_counter() - start if counted is None else counted)
    return times


def our_step(bench: Bench, packs: Sequence[PolicyBatch], form: str) -> float:
    """Forward and backward of one step."""
    mode, recompute = FORMS[form]
    phases = bench.step(packs, mode=mode, recompute=recompute)["phases"]
    return sum(phases[name] for name in ("prepare", "forward", "backward"))


def our_logprobs(bench: Bench, packs: Sequence[PolicyBatch], form: str) -> None:
    bench.use(*FORMS[form])
    bench.trainer.logprobs(tokens_of(packs), temperature=1.0)


def time_ours(bench: Bench, case: Case, form: str, *, kind: str) -> dict[str, Any]:
    packs = bench.packs(case, mode=FORMS[form][0])
    run = {"step": our_step, "logprobs": our_logprobs}[kind]
    once = partial(run, bench, packs, form)
    # One sequence warms the repeated form up: all of them take as long as what is timed.
    times = seconds(bench, once, repeats=3 if form == "shared" else 1, warm_up=partial(run, bench, packs[:1], form))
    return {"seconds": statistics.median(times), "all_seconds": times, "timed": "all"}


def time_hf(bench: Bench, model: PreTrainedModel, case: Case, *, kind: str, count: int) -> dict[str, Any]:
    packs = bench.packs(case, mode="stage1+2")

    def no_grad_pass() -> None:
        with torch.no_grad():
            for batch in packs[:count]:
                hf_logprobs(model, batch)

    def step() -> None:
        hf_step(bench, model, packs, count=count)

    run = {"step": step, "logprobs": no_grad_pass}[kind]
    times = seconds(bench, run, repeats=1, warm_up=run)
    model.zero_grad(set_to_none=True)
    scale = case.group / count
    timed = "all" if count == case.group else f"{count} of {case.group} sequences, times {scale:g}"
    return {"seconds": times[0] * scale, "all_seconds": times, "timed": timed}


def guarded(bench: Bench, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    reset_peak(bench.layout.device)
    try:
        return {"status": "measured", **run(), "peak_gb": peak_gb(bench.layout.device)}
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return {"status": "out of memory"}


def line(row: dict[str, Any]) -> str:
    text = f"{row['kind']:8} P={row['prefix']:7,} {row['form']:8} "
    if row["status"] != "measured":
        return text + row["status"]
    text += f"{row['seconds']:8.3f} s, peak {row['peak_gb']:.1f} GB"
    if "mfu" in row:
        text += f", MFU {row['mfu']:.0%} (with what is computed again {row['hfu']:.0%})"
    if "ratio" in row:
        text += f", {row['ratio']:.2f} times shared"
    return text + ("" if row["timed"] == "all" else f" ({row['timed']})")


def report(rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
    """Keep and print a row, beside shared when that was measured."""
    same = [r for r in rows if (r["kind"], r["prefix"], r["form"]) == (row["kind"], row["prefix"], "shared")]
    if same and "seconds" in same[0] and "seconds" in row:
        row["ratio"] = row["seconds"] / same[0]["seconds"]
    rows.append(row)
    print(line(row), flush=True)


def time_all(folder: Path, cases: Sequence[Case], *, overrides: Sequence[str], count: int) -> list[dict[str, Any]]:
    """Ours first, then transformers' without our model in memory."""
    rows: list[dict[str, Any]] = []
    bench = Bench(folder, overrides, vision=False)
    for case in cases:
        for kind in ("step", "logprobs"):
            for form, (mode, recompute) in FORMS.items():
                row = {"kind": kind, "prefix": case.text, "form": form, "responses": case.group}
                row |= guarded(bench, partial(time_ours, bench, case, form, kind=kind))
                free(bench.layout.device)
                if kind == "step" and "seconds" in row:
                    for name, again in (("mfu", "none"), ("hfu", recompute)):
                        row[name] = bench.flops(case, mode=mode, recompute=again) / row["seconds"] / PEAK
                report(rows, row | {"length": case.response})
    bench.close()
    model = hf_model(bench)
    for case in cases:
        for kind in ("step", "logprobs"):
            row = {"kind": kind, "prefix": case.text, "form": "hf", "responses": case.group, "length": case.response}
            row |= guarded(bench, partial(time_hf, bench, model, case, kind=kind, count=count))
            free(bench.layout.device)
            report(rows, row)
    destroy_layout()
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    parser = parser_of(__doc__)
    parser.add_argument("--prefix", type=int, nargs="+", help="65536 131072; 48 96 with --tiny")
    parser.add_argument("--hf-sequences", type=int, default=1, help="sequences that transformers is timed on")
    parser.add_argument("--check-layers", type=int, default=2)
    parser.add_argument("--plot", help="file for the plot")
    args = parser.parse_args(argv)
    lengths = args.length or (8 if args.tiny else 512)
    prefixes = args.prefix or ([48, 96] if args.tiny else [65536, 131072])
    cases = [Case(frames=0, text=prefix, group=args.responses, response=lengths) for prefix in prefixes]
    small = Case(frames=0, text=40 if args.tiny else 1024, group=4, response=7 if args.tiny else 200)
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_folder(Path(scratch) / "check", layers=args.check_layers, tiny=args.tiny)
        checks = check(folder, case=small, overrides=args.overrides)
        folder = make_folder(Path(scratch) / "timed", layers=args.layers or 4, tiny=args.tiny)
        rows = time_all(folder, cases, overrides=args.overrides, count=min(args.hf_sequences, args.responses))
    save(args.json, [*checks, *rows])
    if args.plot:
        groups: dict[str, dict[str, float]] = {}
        for row in rows:
            if "seconds" in row:
                groups.setdefault(f"{row['kind']}\nP={row['prefix']:,}", {})[row["form"]] = row["seconds"]
        title = f"A step's LLM part, G={args.responses} responses of {lengths}, {machine()['device']}"
        bars(groups, path=args.plot, unit="seconds", title=title)


if __name__ == "__main__":
    main()
