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
from megalong.rollout.same_video import Turns, media_items
from megalong.rollout.transfer import TRANSFER_BACKEND

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
        self,
        requests: Sequence[Request],
        *,
        sampling: Sampling,
        media: tuple[str, int, int] | None,
        first_rows: Sequence[int | None],
    ) -> tuple[list[list[Sampled]], list[list[int]]]:
        """Groups in the order of the requests, and how many prompt tokens of each response were not computed anew.

        media: file, rows and width of the embeddings of all requests; first_rows: where each one's begin there, in the
        same place for requests that share them. Request.embeds_ND is not looked at.
        """
        if media is not None:
            self.llm.collective_rpc("open_media", args=media)
        self.calls += 1
        prompts = [
            engine_input(request, first_row=first_row, call=self.calls)
            for request, first_row in zip(requests, first_rows, strict=True)
        ]
        budget = self.llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
        finished = self._sample(prompts, requests, sampling, Turns(requests, first_rows, step_tokens=budget))
        groups = [[finished[index, place] for place in range(sampling.group_size)] for index in range(len(requests))]
        return (
            [[sampled_of(output.outputs[0]) for output in group] for group in groups],
            [[output.num_cached_tokens or 0 for output in group] for group in groups],
        )

    def _sample(
        self, prompts: Sequence[dict[str, Any]], requests: Sequence[Request], sampling: Sampling, turns: Turns
    ) -> dict[tuple[int, int], Any]:
        """vLLM's finished RequestOutput of each response, by request and place in its group."""
        engine, started, first_tokens, steps = self.llm.llm_engine, time.perf_counter(), 0.0, 0
        finished: dict[tuple[int, int], Any] = {}

        def add(index: int, place: int) -> None:
            params = self._params(sampling, seed=requests[index].seeds[place], tells_of_each_token=place == 0)
            engine.add_request(f"{index}/{place}", prompts[index], params)

        while turns.waiting or engine.has_unfinished_requests():
            for index in turns.take():
                add(index, 0)
            steps += 1
            for output in engine.step():
                index, place = map(int, output.request_id.split("/"))
                if turns.arrived(index):
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


def engine_input(request: Request, *, first_row: int | None, call: int) -> dict[str, Any]:
    """The prompt in the form that vLLM's renderer would give it; see media_items.

    The places between and behind media are tokens.
    """
    ids = [0 if token == MEDIA_TOKEN else token for token in request.ids_P]
    media = media_items(request, first_row=first_row, call=call)
    if not media:
        return {"type": "token", "prompt_token_ids": ids}
    items = []
    for item in media:
        rows = torch.tensor([item.row, item.row + item.length])
        fields = {"rows": rows, "positions": item.positions.expand(3, -1).contiguous()}
        items.append(
            MultiModalKwargsItem(
                {key: MultiModalFieldElem(data=data, field=MultiModalBatchedField()) for key, data in fields.items()}
            )
        )
    places = [PlaceholderRange(offset=item.offset, length=item.length) for item in media]
    return {
        "type": "multimodal",
        "prompt_token_ids": ids,
        "mm_kwargs": MultiModalKwargsItems({"video": items}),
        "mm_hashes": {"video": [item.name for item in media]},
        "mm_placeholders": {"video": places},
    }


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
