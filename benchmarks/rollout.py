"""vLLM rollouts on GPUs: weight sync, prefill of a group, and the sampler's log-probabilities against the trainer's.

A random decoder of the 7B shape in the trainer, a vLLM engine beside it: on the second GPU when there is one (weights
by NCCL), on the trainer's own otherwise (weights by CUDA IPC, the engine sleeping in between). First what must hold:
checksums, the same greedy tokens after the same weights, others after others, a damaged bucket refused. Then the times
of performance targets B6 (prefill of a group, hand-over of its embeddings) and B9 (weight sync), and of decoding.

    python benchmarks/rollout.py [--layers 28] [--prompt 131072] [--length 64] [--baselines] [--json FILE] [--tiny]

Values are printed, and written to --json, as they come; what is under way goes to stderr, with the seconds since the
start. --baselines: the other ways in the same engine, each checked first (rollout_baselines.py); --piecewise: with
CUDA graphs that vLLM's cascade attention can run between.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import rollout_baselines
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
    # Random numbers for 4,096 rows, again and again: for all of a long prompt they take a CPU seconds.
    some = 0.02 * torch.randn(min(media, 4096), width, generator=generator) if media else None
    embeds = None if some is None else some.repeat(-(-media // len(some)), 1)[:media]
    return Request(
        ids_P=tuple(ids), positions_P=torch.arange(len(ids)), next_position=len(ids),
        embeds_ND=None if embeds is None else embeds.to(dtype), seeds=tuple(range(group)),
    )  # fmt: skip


class Report:
    """Values by name, printed and written to a file as they come; what is under way, on stderr."""

    def __init__(self, path: str | None) -> None:
        self.path, self.started = path, time.perf_counter()
        self.row: dict[str, Any] = {}

    def put(self, **values: Any) -> None:
        self.row |= values
        for name, value in values.items():
            print(f"{name:32} {value:.4f}" if isinstance(value, float) else f"{name:32} {value}", flush=True)
        save(self.path, [self.row])

    def stage(self, what: str) -> None:
        print(f"[{time.perf_counter() - self.started:6.1f} s] {what}", file=sys.stderr, flush=True)


class Session:
    """The trainer's model, the engine, and a clock."""

    def __init__(self, bench: Bench, report: Report) -> None:
        self.bench, self.report = bench, report
        report.stage("model")
        # The model alone: beside its gradients and optimizer states, the engine would have no room on one GPU.
        self.model = build_model(bench.config.model, bench.layout, sequence_parallel=False, load=False)
        fill_randomly(self.model, bench.layout)
        report.stage("engine start")
        started = time.perf_counter()
        engine = build_engine(bench.config, bench.layout, task="grpo", eos_id=bench.shape.vocab - 1)
        require(isinstance(engine, VllmEngine), "this rank drives no vLLM engine")
        self.engine, self.version = engine, -1
        report.put(transport=engine.settings.transport.value, start_s=time.perf_counter() - started)

    def buckets(self, **options: Any) -> Iterator[WeightBucket]:
        return export_weights(self.model, self.model.weight_table(), self.bench.layout, **options)

    def sync(self, buckets: Iterator[WeightBucket] | None = None) -> float:
        """Seconds of one update."""
        self.version += 1
        synchronize(self.bench.layout.device)
        started = time.perf_counter()
        self.engine.load_weights(buckets or self.buckets(), version=self.version)
        synchronize(self.bench.layout.device)
        return time.perf_counter() - started

    def request(self, count: int, *, media: int, group: int, seed: int = 1) -> Request:
        """See request_of."""
        return request_of(
            count, media=media, width=self.engine.width, vocab=self.bench.shape.vocab - 1, group=group, seed=seed,
            dtype=self.engine.dtype,
        )  # fmt: skip

    def timed(self, request: Request, **changes: Any) -> tuple[float, list]:
        sampling = self.sampling(request, **changes)
        started = time.perf_counter()
        groups = self.engine.generate([request], sampling=sampling)
        return time.perf_counter() - started, groups[0]

    def sampling(self, request: Request, **changes: Any) -> Sampling:
        """One token at temperature 1, but for the changes."""
        return Sampling(
            group_size=len(request.seeds), **{"max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0, **changes}
        )


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise SystemExit(otherwise)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_sync(session: Session, sync: Callable[[], float]) -> None:
    """Ends the program unless the sampler's greedy tokens follow the trainer's weights: others, and the first again."""
    request = session.request(600, media=512, group=1)
    greedy = {"temperature": 0.0, "max_tokens": 16}
    sync()
    before = session.timed(request, **greedy)[1][0].ids
    sync()
    require(session.timed(request, **greedy)[1][0].ids == before, "the same weights gave other greedy tokens")
    head = session.model.llm.head_weight
    kept = head.detach().clone()
    with torch.no_grad():
        head.copy_(kept.flip(0))
    sync()
    require(session.timed(request, **greedy)[1][0].ids != before, "other weights gave the same greedy tokens")
    with torch.no_grad():
        head.copy_(kept)
    sync()
    require(session.timed(request, **greedy)[1][0].ids == before, "the weights did not come back")


def check(session: Session) -> None:
    """What must hold; ends the program otherwise."""
    session.report.put(first_sync_s=session.sync())
    check_sync(session, session.sync)
    request = session.request(600, media=512, group=1)
    greedy = {"temperature": 0.0, "max_tokens": 16}
    before = session.timed(request, **greedy)[1][0].ids

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
    require(session.timed(request, **greedy)[1][0].ids == before, "the weights did not come back after a refusal")
    session.report.put(refused=refused)


def gap(session: Session, *, prompt: int, length: int) -> None:
    """|sampler - trainer| log-probability over a group's responses behind a prompt of text."""
    request = session.request(min(prompt, 4096), media=0, group=4)
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
        hidden_RD = session.model(shard_tokens(tokens, layout.context, part=llm.sequence_part), None)
        targets_R = tokens.targets_R.to(layout.device)
        vocab = session.bench.shape.vocab
        trained_R, _ = vocab_parallel_logprobs(hidden_RD, llm.head_weight, targets_R, group=layout.tp, real_vocab=vocab)
    trained_R = trained_R.float().cpu()
    sampled_R = torch.tensor([value for item in responses for value in item.logprobs])
    gaps_R: Tensor = (trained_R - sampled_R).abs()
    session.report.put(
        gap_mean=gaps_R.mean().item(), gap_max=gaps_R.max().item(), mean_logprob=sampled_R.mean().item()
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--prompt", type=int, default=131072, help="tokens of the long prompt")
    parser.add_argument("--baselines", action="store_true", help="also time the other ways")
    parser.add_argument(
        "--apart", type=int, default=2, help="--baselines: separate prefills that are timed, then scaled"
    )
    parser.add_argument("--piecewise", action="store_true", help="--baselines: vLLM's breakable CUDA graphs")
    args = parser.parse_args(argv)
    if args.baselines:
        rollout_baselines.use_server(piecewise=args.piecewise)
    folder = Path(tempfile.mkdtemp()) / "run"
    make_folder(folder, layers=args.layers or (2 if args.tiny else 28), tiny=args.tiny)
    prompt = 1100 if args.tiny else args.prompt
    settings = [
        f"logger.run_dir={folder / 'out'}", f"data.max_prompt_tokens={prompt + 8}", "data.max_response_tokens=512",
        "rollout.engine=vllm",
    ]  # fmt: skip
    report = Report(args.json)
    bench = Bench(folder, [*settings, *args.overrides], vision=False)
    session = Session(bench, report)
    try:
        run(session, prompt=prompt, length=args.length or (8 if args.tiny else 64))
        if args.baselines:
            rollout_baselines.run(session, prompt=prompt, media=media_of(prompt), apart=args.apart)
    except BaseException:
        print(session.engine.settings.log_file.read_text()[-6000:])
        raise
    finally:
        session.engine.close()
    report.stage("done")
    destroy_layout()


def media_of(prompt: int) -> int:
    """Embeddings in a prompt of that many tokens."""
    return (prompt - 64) // 257 * 256


def run(session: Session, *, prompt: int, length: int) -> None:
    """Checks and times of ours."""
    engine, report, device = session.engine, session.report, session.bench.layout.device
    report.stage("checks")
    check(session)
    report.stage("gap between the log-probabilities")
    gap(session, prompt=prompt, length=length)
    free(device)
    report.stage("weight sync")
    reset_peak(device)
    held = peak_gb(device)
    report.put(sync_s=median_sync(session, session.sync), sync_peak_extra_gb=peak_gb(device) - held)
    report.stage("decoding behind the long prompt")
    report.put(**decode_steps(session, prompt=prompt, length=length))
    for name, group in (("prefill_1", 1), ("prefill_8", 8)):
        report.stage(name)
        handed, computed = engine.counts["handover_seconds"], engine.counts["prefilled_tokens"]
        request = session.request(prompt, media=media_of(prompt), group=group, seed=1 + group)
        seconds = session.timed(request)[0]
        report.put(**{
            f"{name}_s": seconds, f"{name}_tokens": engine.counts["prefilled_tokens"] - computed,
            f"{name}_handover_s": engine.counts["handover_seconds"] - handed,
        })  # fmt: skip
    report.put(prefill_ratio=report.row["prefill_8_s"] / report.row["prefill_1_s"])
    report.stage("decoding of 64 responses")
    report.put(response_tokens_per_s=decode_rate(session, length=length))


def median_sync(session: Session, sync: Callable[[], float], *, times: int = 3) -> float:
    """Of `times` updates after one that warms up; colocated, the engine sleeps before each."""
    seconds = []
    for _ in range(1 + times):
        session.engine.release()
        seconds.append(sync())
    return statistics.median(seconds[1:])


def decode_steps(session: Session, *, prompt: int, length: int) -> dict[str, float]:
    """Milliseconds of a step of a group of 8 behind a long prompt of text, whose prefill the first call leaves behind:
    of `length` more tokens than one."""
    request = session.request(prompt, media=0, group=8, seed=9)
    session.timed(request)
    first = session.timed(request)[0]
    seconds, responses = session.timed(request, max_tokens=1 + length)
    steps = max(len(item.ids) for item in responses) - 1
    return {"decode_8_first_s": first, "decode_8_ms": (seconds - first) / max(1, steps) * 1e3}


def decode_rate(session: Session, *, length: int) -> float:
    """Response tokens per second of 64 responses to prompts of 1,000 tokens."""
    request = session.request(1000, media=0, group=64, seed=3)
    seconds, responses = session.timed(request, max_tokens=max(length, 128))
    return sum(len(item.ids) for item in responses) / seconds


if __name__ == "__main__":
    main()
