"""The engine's process of rollout.py --baselines: megalong's server, and vLLM's own ways beside it.

`python -m rollout_server` in the place of `python -m megalong.rollout.vllm_server`, with the same arguments.
"""

from __future__ import annotations

import os
import time
from typing import Any

# First: it sets vLLM's environment.
from megalong.rollout.vllm_server import Server, engine_input, main, sampled_of

# isort: split
import torch
from vllm import RequestOutput
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.distributed.weight_transfer.packed_tensor import packed_ipc_consumer
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from megalong.rollout.engine import Request, Sampled, Sampling
from megalong.rollout.transfer import Transport


class BaselineServer(Server):
    """Server, with vLLM's prompt embeddings, prefills that share nothing, and vLLM's receivers of weights."""

    def __init__(self, *, settings: dict[str, Any], **options: Any) -> None:
        if os.environ.get("VLLM_USE_BREAKABLE_CUDAGRAPH") == "1" and "compilation_config" in settings:
            sizes = [1, 2, 4, 8, 16, 32, 64]  # all that is timed; the default sizes take a minute in two kinds
            graphs = {"mode": 0, "cudagraph_mode": "FULL_AND_PIECEWISE", "cudagraph_capture_sizes": sizes}
            settings = {**settings, "compilation_config": graphs}
        super().__init__(settings={**settings, "enable_prompt_embeds": True}, **options)
        self.dtype = getattr(torch, settings["dtype"])

    def generate_apart(
        self, request: Request, *, sampling: Sampling, media: tuple[str, int, int] | None
    ) -> tuple[list[Sampled], list[int]]:
        """generate() of one request, each response with a cache of its own: as many prefills as responses."""
        if media is not None:
            self.llm.collective_rpc("open_media", args=media)
        self.calls += 1
        prompt = engine_input(request, first_row=0, call=self.calls)
        for place, seed in enumerate(request.seeds):
            salted = {**prompt, "cache_salt": f"{self.calls}/{place}"}
            params = self._params(sampling, seed=seed, tells_of_each_token=False)
            self.llm.llm_engine.add_request(str(place), salted, params)
        outputs = sorted(self._finish(), key=lambda output: int(output.request_id))
        return [sampled_of(item.outputs[0]) for item in outputs], [item.num_cached_tokens or 0 for item in outputs]

    def generate_embeds(
        self, *, sampling: Sampling, media: tuple[str, int, int]
    ) -> tuple[list[Sampled], dict[str, float]]:
        """A group as vLLM takes embeddings itself: prompt_embeds [P, D] of the whole prompt, and n responses.

        Seconds: `hand_over_s` until all n requests are in the engine, each block of each of them hashed.
        """
        path, rows, width = media
        embeds_PD = torch.from_file(path, shared=True, size=rows * width, dtype=self.dtype).view(rows, width)
        params = self._params(sampling, seed=0, tells_of_each_token=False)
        params.n = sampling.group_size
        self.calls += 1
        started = time.perf_counter()
        self.llm.llm_engine.add_request(str(self.calls), {"type": "embeds", "prompt_embeds": embeds_PD}, params)
        handed = time.perf_counter() - started
        (output,) = self._finish()
        return [sampled_of(item) for item in output.outputs], {"hand_over_s": handed}

    def _finish(self) -> list[RequestOutput]:
        """Run the engine until all requests are done."""
        finished = []
        while self.llm.llm_engine.has_unfinished_requests():
            finished += [output for output in self.llm.llm_engine.step() if output.finished]
        return finished

    def receive_weights_with(self, name: str) -> None:
        """`megalong`, or `vllm`: vLLM's receiver for the same transport takes the next updates."""
        self.llm.collective_rpc(choose_receiver, args=(name,))

    def cascade(self, is_on: bool) -> int:
        """vLLM's cascade attention for steps whose responses share a prefix of at least 256 tokens, or never. Returns
        how many steps had it since the last call."""
        return self.llm.collective_rpc(choose_cascade, args=(is_on,))[0]


class NcclReceiver(NCCLWeightTransferEngine):
    """vLLM's, in our server's calls: it has no checksums to compare."""

    def check(self, expected: object) -> None:
        return None


class IpcReceiver:
    """What vLLM's IPCWeightTransferEngine does with packed=True (its module needs ray, which this does not)."""

    def __init__(self, ours: Any) -> None:
        self.model, self.model_config, self.device = ours.model, ours.model_config, ours.device

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, info: dict[str, Any]) -> None:
        self.model.load_weights(packed_ipc_consumer(**info, device_index=self.device.index))
        torch.accelerator.synchronize()

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def check(self, expected: object) -> None:
        return None

    def shutdown(self) -> None:
        pass


def choose_receiver(worker: Any, name: str) -> None:
    """Runs in every worker."""
    worker = getattr(worker, "worker", worker)  # of vLLM's wrapper, which would keep what is set to itself
    if not hasattr(worker, "our_receiver"):
        worker.our_receiver = ours = worker.weight_transfer_engine
        if ours.transport is Transport.nccl:
            worker.vllm_receiver = NcclReceiver(ours.config, ours.vllm_config, ours.device, ours.model)
            worker.vllm_receiver.model_update_group = ours.group
        else:
            worker.vllm_receiver = IpcReceiver(ours)
    worker.weight_transfer_engine = worker.our_receiver if name == "megalong" else worker.vllm_receiver


def choose_cascade(worker: Any, is_on: bool) -> int:
    """Runs in every worker. vLLM's own rule never takes it for a group of 8, since it counts tiles as if cascade
    attention could not split the prefix over the GPU."""
    from vllm.v1.attention.backends import flash_attn

    def pays(_: object, *, common_prefix_len: int, query_lens: Any, **__: object) -> bool:
        pays_now = is_on and common_prefix_len >= 256 and len(query_lens) > 1
        worker.cascade_steps += pays_now
        return pays_now

    steps, worker.cascade_steps = getattr(worker, "cascade_steps", 0), 0
    worker.model_runner.cascade_attn_enabled = is_on
    flash_attn.FlashAttentionMetadataBuilder.use_cascade_attention = pays
    return steps


if __name__ == "__main__":
    main(BaselineServer)
