"""What rollout.py --baselines times beside ours, in the same engine, on the same weights and prompts; checked first.

Prefill of a group (B6): a prefill for each response; and vLLM's own way with embeddings, prompt_embeds of the whole
prompt and n=8, which hashes every block of every request. Weight sync (B9): one parameter after the other, each
gathered, sent and loaded by itself; and vLLM's packed transfer (NCCL with GPUs of its own, CUDA IPC on the trainer's).
Decoding behind a long prompt (B4): vLLM's cascade attention.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megalong.engine.weights_io import gather_entry
from megalong.records import MEDIA_TOKEN
from megalong.rollout import vllm_engine
from megalong.rollout.engine import Request, Sampled
from megalong.rollout.transfer import Transport

if TYPE_CHECKING:
    from rollout import Session

LARGEST_GAP = 0.1
"""Between log-probabilities of the same token after the same prompt in bf16, computed in two ways."""


def use_server(*, piecewise: bool) -> None:
    """The next engine has the other ways. piecewise: CUDA graphs of what is between the attention calls, too."""
    vllm_engine.SERVER = "rollout_server"
    if piecewise:
        os.environ["VLLM_USE_BREAKABLE_CUDAGRAPH"] = "1"


def run(session: Session, *, prompt: int, media: int, apart: int) -> None:
    """apart: separate prefills that are timed; the time of 8 is scaled from them."""
    row, report = session.report.row, session.report
    report.stage("baselines: checks of prefill")
    check_prefill(session)
    if session.bench.layout.device.type == "cuda":
        report.stage("baselines: cascade attention")
        cascade(session, prompt=prompt)
    report.stage(f"baselines: {apart} separate prefills")
    seconds, _, cached = generate_apart(session, session.request(prompt, media=media, group=apart, seed=11))
    report.put(apart_8_s=seconds * 8 / apart, apart_timed=apart, apart_cached_tokens=sum(cached))
    report.put(apart_ratio=row["apart_8_s"] / row["prefill_8_s"])
    report.stage("baselines: prompt_embeds, n=8")
    found = generate_embeds(session, session.request(prompt, media=media, group=8, seed=12))[1]
    report.put(embeds_8_s=found["seconds"], embeds_8_hand_over_s=found["hand_over_s"], embeds_8_copy_s=found["copy_s"])
    report.put(embeds_ratio=row["embeds_8_s"] / row["prefill_8_s"])
    report.stage("baselines: weight sync")
    weight_sync(session)


def check_prefill(session: Session) -> None:
    """Ends the program unless all ways give the most likely first token the same log-probability."""
    request, greedy = session.request(600, media=512, group=1), {"temperature": 0.0}
    (ours,) = session.timed(request, **greedy)[1]
    for name, other in (
        ("a prefill of its own", generate_apart(session, request, **greedy)[1][0]),
        ("prompt_embeds", generate_embeds(session, request, **greedy)[0][0]),
    ):
        gap = abs(ours.logprobs[0] - other.logprobs[0])
        if not gap <= LARGEST_GAP:
            raise SystemExit(f"{name}: log-probability {other.logprobs[0]:.4f}, ours {ours.logprobs[0]:.4f}")
        session.report.put(**{f"gap, {name}": gap})
    shared = session.request(600, media=512, group=3)
    cached = generate_apart(session, shared)[2]
    if any(cached):
        raise SystemExit(f"separate prefills found {cached} tokens of each other in the cache")


def generate_apart(session: Session, request: Request, **changes: Any) -> tuple[float, list[Sampled], list[int]]:
    """Seconds, responses, and prompt tokens that each response found in the cache: none."""
    engine, started = session.engine, time.perf_counter()
    media, _ = engine.media.write([request.embeds_ND])
    sampling = session.sampling(request, **changes)
    responses, cached = engine._call(
        "generate_apart", replace(request, embeds_ND=None), sampling=sampling, media=media
    )  # fmt: skip
    return time.perf_counter() - started, responses, cached


def generate_embeds(session: Session, request: Request, **changes: Any) -> tuple[list[Sampled], dict[str, float]]:
    """Responses, and seconds: in all, to copy the embeddings into the engine's process, to hand the requests over."""
    engine = session.engine
    embeds_PD = whole_embeddings(session, request)
    started = time.perf_counter()
    media, _ = engine.media.write([embeds_PD])
    copied = time.perf_counter() - started
    responses, found = engine._call("generate_embeds", sampling=session.sampling(request, **changes), media=media)
    return responses, {**found, "copy_s": copied, "seconds": time.perf_counter() - started}


@torch.no_grad()
def whole_embeddings(session: Session, request: Request) -> Tensor:
    """[P, D] on the host: of the text's tokens by the trainer's model, and the request's at the media places. One
    tensor-parallel rank."""
    table_VD = session.model.llm.embedding.word_embeddings.weight
    ids_P = torch.tensor(request.ids_P)
    embeds_PD = table_VD[ids_P.clamp_min(0).to(table_VD.device)].to("cpu", session.engine.dtype)
    embeds_PD[ids_P == MEDIA_TOKEN] = request.embeds_ND
    return embeds_PD


def weight_sync(session: Session) -> None:
    """Seconds of an update in each way, after the checks that ours has."""
    from rollout import check_sync, median_sync

    report, ours = session.report, session.report.row["sync_s"]
    ways: dict[str, Callable[[], float]] = {
        "one by one": lambda: session.sync(session.buckets(bucket_bytes=1)),
    }
    if session.engine.settings.transport is not Transport.file:  # vLLM has none for the CPU
        ways["vllm packed"] = lambda: vllm_sync(session, packed=True)
    if session.engine.settings.transport is Transport.nccl:
        ways["vllm one by one"] = lambda: vllm_sync(session, packed=False)
    for name, sync in ways.items():
        report.stage(f"baselines: weight sync, {name}")
        session.engine._call("receive_weights_with", "vllm" if name.startswith("vllm") else "megalong")
        check_sync(session, sync)
        seconds = median_sync(session, sync)
        report.put(**{f"sync, {name}, s": seconds, f"sync, {name}, ratio": seconds / ours})
    session.engine._call("receive_weights_with", "megalong")


def vllm_sync(session: Session, *, packed: bool) -> float:
    """Seconds of one update through vLLM's transfer for the same transport."""
    from rollout import synchronize

    engine, device = session.engine, session.bench.layout.device
    layout, table = session.bench.layout, session.model.weight_table()
    parameters = dict(session.model.named_parameters())

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for entry in table:
            whole = gather_entry(entry, parameters[entry.megatron].detach(), layout)
            names = [engine.weights.name_of(name) for name in entry.hf]
            yield from ((name, tensor) for name, tensor in zip(names, whole, strict=True) if name is not None)

    described = [(name, str(item.dtype).removeprefix("torch."), list(item.shape)) for name, item in tensors()]
    names, dtypes, shapes = map(list, zip(*described, strict=True))
    synchronize(device)
    started = time.perf_counter()
    engine._make_room()
    engine._call("start_update")
    if engine.settings.transport is Transport.nccl:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

        engine._send("update", {"names": names, "dtype_names": dtypes, "shapes": shapes, "packed": packed})
        send, how = NCCLWeightTransferEngine.trainer_send_weights, {"group": engine._group, "packed": packed}
        engine._together("update", lambda: send(tensors(), how))  # an engine that fails would never take part
        engine._answer("update")
    else:
        from vllm.distributed.weight_transfer.packed_tensor import packed_ipc_producer

        room = max(1 << 30, *(item.numel() * item.element_size() for _, item in tensors()))
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        for chunk in packed_ipc_producer(tensors(), uuid, lambda pair: pair[1], room):
            engine._call("update", asdict(chunk))
            torch.cuda.ipc_collect()
    engine._make_room()
    wrong = engine._call("finish_update", [])
    engine._asleep = False
    synchronize(device)
    if wrong:
        raise SystemExit(f"vLLM's transfer: {wrong}")
    return time.perf_counter() - started


def cascade(session: Session, *, prompt: int) -> None:
    """A step of a group of 8 with cascade attention against one without; ends the program when they disagree."""
    from rollout import decode_steps

    request = session.request(prompt, media=0, group=8, seed=9)
    chosen = {"temperature": 0.0, "max_tokens": 4}
    without = session.timed(request, **chosen)[1]
    session.engine._call("cascade", True)
    found = session.timed(request, **chosen)[1]
    # Of the most likely token each time; the second one only where the first was the same (rounding may choose).
    gap = max(
        abs(one.logprobs[place] - two.logprobs[place])
        for one, two in zip(without, found, strict=True)
        for place in ((0, 1) if one.ids[0] == two.ids[0] else (0,))
    )
    if not gap <= LARGEST_GAP:
        raise SystemExit(f"cascade attention: a log-probability {gap:.4f} from that without it")
    with_it = decode_steps(session, prompt=prompt, length=64)["decode_8_ms"]
    steps = session.engine._call("cascade", False)
    if not steps:
        raise SystemExit("cascade attention was on and no step had it")
    session.report.put(cascade_gap=gap, cascade_steps=steps, cascade_8_ms=with_it)
    session.report.put(cascade_ratio=session.report.row["decode_8_ms"] / with_it)
