"""The process that holds one vLLM engine. `VllmEngine` starts it and calls its methods over a socket, one at a time.

A process of its own keeps vLLM's GPUs, process groups and environment apart from the trainer's. The engine core runs
in this very process, so that a failure of it ends the process, which the trainer sees.
"""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

# Before vLLM is imported: no engine core process behind this one, no telemetry, the sampler that needs no compiler.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # TakesMedia and the sleep mode were written for the first runner

import torch
from vllm import LLM, SamplingParams
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.logger import init_logger
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    MultiModalKwargsItems,
    PlaceholderRange,
)
from vllm.sampling_params import RequestOutputKind

from megalong.records import MEDIA_TOKEN
from megalong.rollout import vllm_worker
from megalong.rollout.engine import Request, Sampled, Sampling
from megalong.rollout.process_group import end_with
from megalong.rollout.transfer import MEDIA_ITEM_TOKENS, TRANSFER_BACKEND

logger = init_logger("vllm.megalong")


class Server:
    """The engine. Every method is called by the client (VllmEngine); arguments and results are pickled."""

    def __init__(self, *, folder: str, eos_id: int, settings: dict[str, Any]) -> None:
        self.eos_id = eos_id
        self.llm = LLM(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            enable_mm_embeds=True,
            limit_mm_per_prompt={"video": 0},
            mm_processor_cache_gb=0,
            enable_prefix_caching=True,
            weight_transfer_config=WeightTransferConfig(backend=TRANSFER_BACKEND),
            worker_extension_cls=f"{vllm_worker.__name__}.WorkerExtension",
            **settings,
        )
        self.llm.collective_rpc("pay_no_heed_to_sigterm")
        self.calls = 0
        self.asleep = False

    def init_transfer(self, info: dict[str, Any]) -> None:
        self.llm.init_weight_transfer_engine({"init_info": info})

    def start_update(self) -> None:
        if self.asleep:
            self.llm.wake_up(tags=["weights"])
        self.llm.start_weight_update()

    def update(self, info: dict[str, Any]) -> None:
        self.llm.update_weights({"update_info": info})

    def finish_update(self, checksums: list[list[int]]) -> str | None:
        """What was wrong with the update, None when nothing was. Keys and values of older weights are forgotten."""
        self.llm.finish_weight_update()
        wrong = [text for text in self.llm.collective_rpc("check_update", args=(checksums,)) if text]
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False
        if not self.llm.reset_prefix_cache():
            wrong.append("vLLM kept its prefix cache: requests are still running")
        return wrong[0] if wrong else None

    def sleep(self, level: int) -> None:
        """Give back the memory of the weights (2: they are lost, 1: kept on the host) and of keys and values."""
        self.llm.sleep(level=level)
        self.asleep = True

    def wake(self) -> None:
        """After sleep(1): weights are back, keys and values empty."""
        self.llm.wake_up()
        self.asleep = False

    def close_media(self) -> None:
        """Let go of the file that the last embeddings were in."""
        self.llm.collective_rpc("close_media")

    def generate(
        self, requests: Sequence[Request], *, sampling: Sampling, media: tuple[str, int, int] | None
    ) -> tuple[list[list[Sampled]], list[list[int]]]:
        """Groups in the order of the requests, and how many prompt tokens of each response were not computed anew.

        media: file, rows and width of the embeddings of all requests, in order; Request.embeds_ND is not looked at.
        """
        if media is not None:
            self.llm.collective_rpc("open_media", args=media)
        self.calls += 1
        prompts, first_row = [], 0
        for index, request in enumerate(requests):
            prompts.append(engine_input(request, first_row=first_row, name=f"{self.calls}/{index}"))
            first_row += request.ids_P.count(MEDIA_TOKEN)
        finished = self._sample(prompts, requests, sampling)
        groups = [[finished[index, place] for place in range(sampling.group_size)] for index in range(len(requests))]
        return (
            [[sampled_of(output.outputs[0]) for output in group] for group in groups],
            [[output.num_cached_tokens or 0 for output in group] for group in groups],
        )

    def _sample(
        self, prompts: Sequence[dict[str, Any]], requests: Sequence[Request], sampling: Sampling
    ) -> dict[tuple[int, int], Any]:
        """vLLM's finished RequestOutput of each response, by request and place in its group.

        A response finds in the prefix cache what was computed before it was scheduled. So the first response of a group
        goes ahead, and the others follow when it has a token; sent together, they may be scheduled behind the first
        piece of a long prompt, and compute the rest once each. As many groups go ahead at a time as one step takes.
        """
        engine, started, first_tokens, steps = self.llm.llm_engine, time.perf_counter(), 0.0, 0
        budget = engine.vllm_config.scheduler_config.max_num_batched_tokens
        waiting, ahead = deque(range(len(requests))), set[int]()
        finished: dict[tuple[int, int], Any] = {}

        def add(index: int, place: int) -> None:
            params = self._params(sampling, seed=requests[index].seeds[place], tells_of_each_token=place == 0)
            engine.add_request(f"{index}/{place}", prompts[index], params)

        while waiting or engine.has_unfinished_requests():
            while waiting and (
                not ahead or sum(len(requests[index].ids_P) for index in [*ahead, waiting[0]]) <= budget
            ):
                ahead.add(waiting[0])
                add(waiting.popleft(), 0)
            steps += 1
            for output in engine.step():
                index, place = map(int, output.request_id.split("/"))
                if index in ahead:
                    ahead.remove(index)
                    first_tokens = time.perf_counter() - started
                    for follower in range(1, sampling.group_size):
                        add(index, follower)
                if output.finished:
                    finished[index, place] = output
        seconds = time.perf_counter() - started
        logger.info(
            "%d groups: the last one's first token after %.2f s; %d steps, %.2f s",
            len(requests), first_tokens, steps, seconds,
        )  # fmt: skip
        return finished

    def _params(self, sampling: Sampling, *, seed: int, tells_of_each_token: bool) -> SamplingParams:
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            seed=seed,
            logprobs=0,
            stop_token_ids=[self.eos_id],
            detokenize=False,
            output_kind=RequestOutputKind.CUMULATIVE if tells_of_each_token else RequestOutputKind.FINAL_ONLY,
        )


def engine_input(request: Request, *, first_row: int, name: str) -> dict[str, Any]:
    """The prompt in the form that vLLM's renderer would give it.

    Media places become items of at most MEDIA_ITEM_TOKENS; the places between and behind them are tokens. `name` is
    unique to the request among all that share a prefix cache.
    """
    ids = [0 if token == MEDIA_TOKEN else token for token in request.ids_P]
    runs = media_runs(request.ids_P)
    if not runs:
        return {"type": "token", "prompt_token_ids": ids}
    items, row, told = [], first_row, 0
    for offset, length in runs:
        last = len(ids) if (offset, length) == runs[-1] else offset + length
        positions = request.positions_P[..., told:last]
        fields = {"rows": torch.tensor([row, row + length]), "positions": positions.expand(3, -1).contiguous()}
        items.append(
            MultiModalKwargsItem(
                {key: MultiModalFieldElem(data=data, field=MultiModalBatchedField()) for key, data in fields.items()}
            )
        )
        row, told = row + length, last
    return {
        "type": "multimodal",
        "prompt_token_ids": ids,
        "mm_kwargs": MultiModalKwargsItems({"video": items}),
        "mm_hashes": {"video": [f"{name}/{index}" for index in range(len(runs))]},
        "mm_placeholders": {"video": [PlaceholderRange(offset=offset, length=length) for offset, length in runs]},
    }


def media_runs(ids: Sequence[int]) -> list[tuple[int, int]]:
    """(offset, length) of the runs of MEDIA_TOKEN, long ones in pieces."""
    is_media = torch.tensor(ids) == MEDIA_TOKEN
    edges = torch.diff(is_media.int(), prepend=torch.zeros(1, dtype=torch.int32), append=torch.zeros(1).int())
    starts, stops = (edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist()
    return [
        (at, min(MEDIA_ITEM_TOKENS, stop - at))
        for start, stop in zip(starts, stops, strict=True)
        for at in range(start, stop, MEDIA_ITEM_TOKENS)
    ]


def sampled_of(output: Any) -> Sampled:
    """vLLM's CompletionOutput; the end token is part of it."""
    ids = tuple(output.token_ids)
    logprobs = tuple(step[token].logprob for step, token in zip(output.logprobs, ids, strict=True))
    return Sampled(ids=ids, logprobs=logprobs, truncated=output.finish_reason == "length")


def serve(connection: Connection, make: Callable[..., Server]) -> None:
    """Answer calls until the trainer hangs up. The first call makes the engine."""
    server: Server | None = None
    while True:
        try:
            method, args, kwargs = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            if method == "start":
                server = make(**kwargs)
                result = None
            else:
                result = getattr(server, method)(*args, **kwargs)
            reply = (True, result)
        except Exception:  # noqa: BLE001 - the trainer gets it and decides
            reply = (False, traceback.format_exc())
        connection.send_bytes(pickle.dumps(reply))


def main(make: Callable[..., Server] = Server) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the trainer saves first (Slurm tells every process)
    threading.Thread(target=end_with, args=(int(sys.argv[2]), sys.argv[3]), daemon=True).start()
    try:
        with Connection(int(sys.argv[1])) as trainer:
            serve(trainer, make)
    finally:
        shutil.rmtree(sys.argv[3], ignore_errors=True)  # a trainer that failed did not


if __name__ == "__main__":
    main()
