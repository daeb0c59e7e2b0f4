"""vLLM rollouts on GPUs: weight sync, prefill of a group, and the sampler's log-probabilities against the trainer's.

A random decoder of the 7B shape in the trainer, a vLLM engine beside it: on the second GPU when there is one (weights
by NCCL), on the trainer's own otherwise (weights by CUDA IPC, the engine sleeping in between). First what must hold:
checksums, the same greedy tokens after the same weights, others after others, a damaged bucket refused. Then the times
of performance targets B6 (prefill of a group, hand-over of its embeddings) and B9 (weight sync).

    python benchmarks/rollout.py [--layers 28] [--prompt 131072] [--length 64] [--json FILE] [--tiny]
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from steps import Bench, fill_randomly, free, make_folder, parser_of, peak_gb, reset_peak, sample_of, save
from torch import Tensor

from megalong.attention.shard import shard_tokens
from megalong.data.packing import GroupTokens, pack_groups
from megalong.engine.build import build_model
from megalong.engine.weights_io import export_weights
from megalong.engines import build_engine
from megalong.objectives.logprobs import vocab_parallel_logprobs
from megalong.parallel.layout import destroy_layout
from megalong.records import MEDIA_TOKEN, FrameSelection, Prompt, WeightBucket
from megalong.rollout.engine import Request, Sampling, WeightSyncError
from megalong.rollout.vllm_engine import VllmEngine


def request_of(
    length: int, *, media: int, width: int, vocab: int, group: int, seed: int, dtype: torch.dtype
) -> Request:
    """A random prompt: 8 tokens, `media` embeddings in frames of 256 and a newline, tokens."""
    generator = torch.Generator().manual_seed(seed)
    frame = [MEDIA_TOKEN] * 256 + [13]
    text = torch.randint(vocab, (length,), generator=generator).tolist()
    ids = [*text[:8], *(frame * (media // 256))]
    ids += text[len(ids) :]
    embeds = 0.02 * torch.randn(media, width, generator=generator) if media else None
    return Request(
        ids_P=tuple(ids), positions_P=torch.arange(len(ids)), next_position=len(ids),
        embeds_ND=None if embeds is None else embeds.to(dtype), seeds=tuple(range(group)),
    )  # fmt: skip


class Session:
    """The trainer's model, the engine, and a clock."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        # The model alone: beside its gradients and optimizer states, the engine would have no room on one GPU.
        self.model = build_model(bench.config.model, bench.layout, sequence_parallel=False, load=False)
        fill_randomly(self.model, bench.layout)
        started = time.perf_counter()
        engine = build_engine(bench.config, bench.layout, task="grpo", eos_id=bench.shape.vocab - 1)
        require(isinstance(engine, VllmEngine), "this rank drives no vLLM engine")
        self.engine, self.version = engine, -1
        self.start_seconds = time.perf_counter() - started

    def buckets(self) -> Iterator[WeightBucket]:
        return export_weights(self.model, self.model.weight_table(), self.bench.layout)

    def sync(self, buckets: Iterator[WeightBucket] | None = None) -> float:
        """Seconds of one update."""
        self.version += 1
        synchronize(self.bench.layout.device)
        started = time.perf_counter()
        self.engine.load_weights(buckets or self.buckets(), version=self.version)
        synchronize(self.bench.layout.device)
        return time.perf_counter() - started

    def timed(self, request: Request, **changes: Any) -> tuple[float, list]:
        sampling = Sampling(
            group_size=len(request.seeds), **{"max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0, **changes}
        )
        started = time.perf_counter()
        groups = self.engine.generate([request], sampling=sampling)
        return time.perf_counter() - started, groups[0]


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise SystemExit(otherwise)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check(session: Session, make: Callable[..., Request]) -> dict[str, Any]:
    """What must hold; ends the program otherwise."""
    request = make(600, media=512, group=1)
    first_seconds = session.sync()
    greedy = {"temperature": 0.0, "max_tokens": 16}
    before = session.timed(request, **greedy)[1][0].ids
    session.sync()
    require(session.timed(request, **greedy)[1][0].ids == before, "the same weights gave other greedy tokens")
    head = session.model.llm.head_weight
    kept = head.detach().clone()
    with torch.no_grad():
        head.copy_(kept.flip(0))
    session.sync()
    require(session.timed(request, **greedy)[1][0].ids != before, "other weights gave the same greedy tokens")
    with torch.no_grad():
        head.copy_(kept)

    def damaged() -> Iterator[WeightBucket]:
        for index, bucket in enumerate(session.buckets()):
            if index == 0:
                name, tensor = next(iter(bucket.tensors.items()))
                wrong = tensor.clone()
                wrong.view(-1)[0] += 1
                bucket = replace(bucket, tensors={**bucket.tensors, name: wrong})
            yield bucket

    try:
        session.sync(damaged())
    except WeightSyncError as error:
        refused = str(error)
    else:
        require(False, "a damaged bucket was loaded")
    session.sync()
    require(session.timed(request, **greedy)[1][0].ids == before, "the weights did not come back")
    return {"first_sync_s": first_seconds, "refused": refused}


def gap(session: Session, make: Callable[..., Request], *, prompt: int, length: int) -> dict[str, float]:
    """|sampler - trainer| log-probability over a group's responses behind a prompt of text."""
    request = make(min(prompt, 4096), media=0, group=4)
    responses = session.timed(request, max_tokens=length)[1]
    selections: tuple[FrameSelection, ...] = ()
    prompt = Prompt(
        sample=sample_of(()), ids_P=request.ids_P, selections=selections, positions_P=request.positions_P,
        next_position=request.next_position,
    )  # fmt: skip
    tokens = pack_groups([GroupTokens(prompt=prompt, responses=tuple(item.ids for item in responses))])
    session.engine.release()
    layout, llm = session.bench.layout, session.model.llm
    with torch.no_grad():
        hidden_RD = session.model(shard_tokens(tokens, layout.context, multiple=llm.sequence_multiple), None)
        targets_R = tokens.targets_R.to(layout.device)
        vocab = session.bench.shape.vocab
        trained_R, _ = vocab_parallel_logprobs(hidden_RD, llm.head_weight, targets_R, group=layout.tp, real_vocab=vocab)
    trained_R = trained_R.float().cpu()
    sampled_R = torch.tensor([value for item in responses for value in item.logprobs])
    gaps_R: Tensor = (trained_R - sampled_R).abs()
    return {"gap_mean": gaps_R.mean().item(), "gap_max": gaps_R.max().item(), "mean_logprob": sampled_R.mean().item()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--prompt", type=int, default=131072, help="tokens of the long prompt")
    args = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp()) / "run"
    make_folder(folder, layers=args.layers or (2 if args.tiny else 28), tiny=args.tiny)
    prompt = 1100 if args.tiny else args.prompt
    settings = [
        f"logger.run_dir={folder / 'out'}", f"data.max_prompt_tokens={prompt + 8}", "data.max_response_tokens=512",
        "rollout.engine=vllm",
    ]  # fmt: skip
    bench = Bench(folder, [*settings, *args.overrides], vision=False)
    session = Session(bench)
    try:
        rows = run(session, prompt=prompt, length=args.length or (8 if args.tiny else 64))
    except BaseException:
        print(session.engine.settings.log_file.read_text()[-6000:])
        raise
    finally:
        session.engine.close()
    save(args.json, [rows])
    for name, value in rows.items():
        print(f"{name:28} {value:.4f}" if isinstance(value, float) else f"{name:28} {value}")
    destroy_layout()


def run(session: Session, *, prompt: int, length: int) -> dict[str, Any]:
    """Checks and times, as one row."""
    bench, engine = session.bench, session.engine
    device, width = bench.layout.device, engine.width

    def make(count: int, *, media: int, group: int, seed: int = 1) -> Request:
        return request_of(
            count, media=media, width=width, vocab=bench.shape.vocab - 1, group=group, seed=seed, dtype=engine.dtype
        )

    row: dict[str, Any] = {"transport": engine.settings.transport.value, "start_s": session.start_seconds}
    row |= check(session, make)
    row |= gap(session, make, prompt=prompt, length=length)
    free(device)
    reset_peak(device)
    held = peak_gb(device)
    seconds = []
    for _ in range(4):
        engine.release()
        seconds.append(session.sync())
    row |= {"sync_s": statistics.median(seconds[1:]), "sync_peak_extra_gb": peak_gb(device) - held}
    media = (prompt - 64) // 257 * 256
    session.timed(make(prompt, media=media, group=1, seed=2))  # warm
    for name, group in (("prefill_1_s", 1), ("prefill_8_s", 8)):
        handed, computed = engine.handover_seconds, engine.prefilled_tokens
        row[name] = session.timed(make(prompt, media=media, group=group, seed=group))[0]
        row[name.replace("_s", "_tokens")] = engine.prefilled_tokens - computed
        row[name.replace("_s", "_handover_s")] = engine.handover_seconds - handed
    row["prefill_ratio"] = row["prefill_8_s"] / row["prefill_1_s"]
    row["response_tokens_per_s"] = decode_rate(session, make, length=length)
    return row


def decode_rate(session: Session, make: Callable[..., Request], *, length: int) -> float:
    """Response tokens per second of 64 responses to prompts of 1,000 tokens."""
    request = make(1000, media=0, group=64, seed=3)
    seconds, responses = session.timed(request, max_tokens=max(length, 128))
    return sum(len(item.ids) for item in responses) / seconds


if __name__ == "__main__":
    main()
