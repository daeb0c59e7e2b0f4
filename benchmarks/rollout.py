"""vLLM rollouts on GPUs: weight sync, prefill of a group, and the sampler's log-probabilities against the trainer's.

A random decoder of the 7B shape in the trainer, a vLLM engine beside it: on the second GPU when there is one (weights
by NCCL), on the trainer's own otherwise (weights by CUDA IPC, the engine sleeping in between). First what must hold:
checksums, the same greedy tokens after the same weights, others after others, a damaged bucket refused. Then the times
of performance targets B6 (prefill of a group, hand-over of its embeddings) and B9 (weight sync), and of decoding.

    python benchmarks/rollout.py [--layers 28] [--prompt 131072] [--length 64] [--baselines] [--json FILE] [--tiny]
    torchrun --nproc-per-node 2 benchmarks/rollout.py --sync-only --overrides parallel.tp=2
        rollout.placement=disaggregated rollout.engine_tp=2

Values are printed, and written to --json, as they come; what is under way goes to stderr, with the seconds since the
start. --baselines: the other ways in the same engine, each checked first (rollout_baselines.py); --piecewise: with
CUDA graphs that vLLM's cascade attention can run between. --sync-only: B9 alone, from as many trainers as processes,
to engines with GPUs of their own: checks, seconds, extra memory of the trainer that has most, a profile of one sync,
and the time when buckets leave on the trainer's own stream, so that none is gathered meanwhile.
"""

from __future__ import annotations

import os
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
from megalong.parallel.collectives import broadcast_object, gather_objects
from megalong.parallel.layout import destroy_layout
from megalong.records import MEDIA_TOKEN, FrameSelection, Prompt, WeightBucket
from megalong.rollout.engine import Request, Sampling, WeightSyncError
from megalong.rollout.sampler import GroupSampler
from megalong.rollout.transfer import Transport
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

    def __init__(self, path: str | None, *, quiet: bool = False) -> None:
        self.path, self.quiet, self.started = path, quiet, time.perf_counter()
        self.row: dict[str, Any] = {}

    def put(self, **values: Any) -> None:
        self.row |= values
        if self.quiet:
            return
        for name, value in values.items():
            print(f"{name:32} {value:.4f}" if isinstance(value, float) else f"{name:32} {value}", flush=True)
        save(self.path, [self.row])

    def stage(self, what: str) -> None:
        if not self.quiet:
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
        require(isinstance(engine, VllmEngine | None), "vLLM is not what samples")
        self.engine, self.version = engine, -1
        self.sampler = GroupSampler(engine, bench.layout, decode=str, seed=1)
        if engine is not None:
            report.put(transport=engine.settings.transport.value, start_s=time.perf_counter() - started)

    def buckets(self, **options: Any) -> Iterator[WeightBucket]:
        return export_weights(self.model, self.model.weight_table(), self.bench.layout, **options)

    def sync(self, buckets: Iterator[WeightBucket] | None = None) -> float:
        """Seconds of one update."""
        self.version += 1
        synchronize(self.bench.layout.device)
        started = time.perf_counter()
        self.sampler.load_weights(buckets or self.buckets(), version=self.version)
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

    def greedy(self) -> tuple[int, ...]:
        """16 greedy tokens behind 600, on every rank; rank 0 drives an engine."""
        request = self.request(600, media=512, group=1) if self.engine else None
        ids = self.timed(request, temperature=0.0, max_tokens=16)[1][0].ids if request else None
        return broadcast_object(ids, source=0, group=self.bench.layout.world)

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
    sync()
    before = session.greedy()
    sync()
    require(session.greedy() == before, "the same weights gave other greedy tokens")
    head = session.model.llm.head_weight
    kept = head.detach().clone()
    with torch.no_grad():
        head.copy_(kept.flip(0))
    sync()
    require(session.greedy() != before, "other weights gave the same greedy tokens")
    with torch.no_grad():
        head.copy_(kept)
    sync()
    require(session.greedy() == before, "the weights did not come back")


def check(session: Session) -> None:
    """What must hold; ends the program otherwise."""
    session.report.put(first_sync_s=session.sync())
    check_sync(session, session.sync)
    before = session.greedy()

    def damaged() -> Iterator[WeightBucket]:
        for index, bucket in enumerate(session.buckets()):
            if index == 0:
                name, tensor = next(iter(bucket.tensors.items()))
                wrong = tensor.clone()
                wrong.view(-1)[0] += 1
                bucket = replace(bucket, tensors={**bucket.tensors, name: wrong})
            yield bucket

    refused = ""
    try:
        session.sync(damaged())
    except WeightSyncError as error:
        refused = str(error)
    require(bool(refused) or session.engine is None, "a damaged bucket was loaded")
    session.sync()
    require(session.greedy() == before, "the weights did not come back after a refusal")
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
    parser.add_argument("--sync-only", action="store_true", help="B9 alone, from one trainer or several")
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
    report = Report(args.json, quiet=int(os.environ.get("RANK", "0")) > 0)
    bench = Bench(folder, [*settings, *args.overrides], vision=False)
    session = Session(bench, report)
    try:
        if args.sync_only:
            only_sync(session)
        else:
            require(session.engine is not None and bench.layout.world_size == 1, "several processes: --sync-only")
            run(session, prompt=prompt, length=args.length or (8 if args.tiny else 64))
        if args.baselines:
            rollout_baselines.run(session, prompt=prompt, media=media_of(prompt), apart=args.apart)
    except BaseException:
        if session.engine is not None:
            print(session.engine.settings.log_file.read_text()[-6000:])
        raise
    finally:
        session.sampler.close()
    report.stage("done")
    destroy_layout()


def media_of(prompt: int) -> int:
    """Embeddings in a prompt of that many tokens."""
    return (prompt - 64) // 257 * 256


def run(session: Session, *, prompt: int, length: int) -> None:
    """Checks and times of ours."""
    engine, report = session.engine, session.report
    report.stage("checks")
    check(session)
    report.stage("gap between the log-probabilities")
    gap(session, prompt=prompt, length=length)
    time_sync(session)
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


def time_sync(session: Session) -> None:
    """Seconds of a sync, and the memory that it takes beyond what the trainer holds."""
    device = session.bench.layout.device
    session.report.stage("weight sync")
    free(device)
    reset_peak(device)
    held = peak_gb(device)
    seconds = median_sync(session, session.sync)
    extra = max(gather_objects(peak_gb(device) - held, group=session.bench.layout.world))
    session.report.put(sync_s=seconds, sync_peak_extra_gb=extra)


def median_sync(session: Session, sync: Callable[[], float], *, times: int = 3) -> float:
    """Of `times` updates after one that warms up; colocated, the engine sleeps before each."""
    seconds = []
    for _ in range(1 + times):
        session.sampler.release()
        seconds.append(sync())
    return statistics.median(seconds[1:])


def only_sync(session: Session) -> None:
    """Checks, times and a profile of weight syncs from all processes."""
    check(session)
    time_sync(session)
    session.report.stage("profile")
    found: dict[str, float] = {}
    median_sync(session, lambda: profiled(session, found))
    session.report.put(**found)
    if session.engine is not None and session.engine.settings.transport is Transport.nccl:
        session.engine._room._stream = torch.cuda.current_stream()
    session.report.stage("on the trainer's stream")
    session.report.put(sync_one_stream_s=median_sync(session, session.sync))


def profiled(session: Session, found: dict[str, float]) -> float:
    """Seconds of a sync under torch's profiler; `found`: those that kernels of each kind ran on this GPU."""
    with torch.profiler.profile() as profile:
        seconds = session.sync()
    busy = {"gather": 0.0, "broadcast": 0.0, "": 0.0}
    for event in profile.events():
        # torch marks a collective's stretch beside its kernel.
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            kind = next(kind for kind in busy if kind in event.name.lower())
            busy[kind] += event.time_range.elapsed_us() / 1e6
    found |= {f"profiled sync, {kind or 'copies and checksums'}, s": value for kind, value in busy.items()}
    found |= {"profiled sync, s": seconds}
    return seconds


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
