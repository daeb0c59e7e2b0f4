"""Inside vLLM's processes: LLMs that take embeddings for media places, and the receiver of weight buckets.

vLLM imports this module in every worker (as its worker extension). All of vLLM's plug-in points that megalong uses are
here and in vllm_server.py, but for the trainer's end of the NCCL group (vllm_engine.py).
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo, worker_init_process_group
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.models.interfaces import SupportsMRoPE, SupportsMultiModal
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.qwen3_vl import Qwen3LLMForCausalLM
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.multimodal.processing import BaseMultiModalProcessor, BaseProcessingInfo
from vllm.multimodal.processing.dummy_inputs import BaseDummyInputsBuilder
from vllm.sequence import IntermediateTensors

from megalong.records import tensor_checksums
from megalong.rollout.logits import float32_logits
from megalong.rollout.transfer import MEDIA_ITEM_TOKENS, TRANSFER_BACKEND, Manifest, Transport, unpack_bucket


class MediaInfo(BaseProcessingInfo):
    """One modality, whose items are given as embeddings: nothing is encoded here."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"video": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"video": MEDIA_ITEM_TOKENS}


class NoDummyMedia(BaseDummyInputsBuilder[MediaInfo]):
    """vLLM profiles encoders with dummy inputs; there is no encoder."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        raise TypeError("embeddings have no dummy text")

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]) -> dict:
        raise TypeError("embeddings have no dummy data")


class NoProcessor(BaseMultiModalProcessor[MediaInfo]):
    """Prompts arrive processed (vllm_server.engine_input)."""

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> dict:
        raise TypeError("prompts arrive processed")

    def _get_prompt_updates(self, *args: Any) -> Sequence[Any]:
        raise TypeError("prompts arrive processed")


class TakesMedia(SupportsMultiModal, SupportsMRoPE):
    """Media places of a prompt are filled with rows of a tensor that open_media maps, positions as the prompt has them.

    An item of a prompt carries `rows` [2], the first and the last + 1 of its rows, and `positions` [3, n] of the tokens
    since the item before it; those of the last item reach to the end of the prompt.
    """

    media_ND: Tensor | None = None
    media_file: tuple[str, int] | None = None  # of media_ND, and its rows

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        # Past the protocols, whose __init__ calls no other. vLLM's class stands behind them, as its embed_input_ids
        # takes no media.
        super(SupportsMRoPE, self).__init__(vllm_config=vllm_config, prefix=prefix)
        self.lm_head.quant_method = Float32Head()

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        device = next(self.parameters()).device
        return [
            self.media_ND[first:last].to(device, non_blocking=True) for first, last in torch.as_tensor(kwargs["rows"])
        ]

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[Tensor, int]:
        if not mm_features:
            return torch.arange(len(input_tokens)).expand(3, -1), 0
        positions = torch.cat([item.data["positions"].data for item in mm_features], dim=1)
        return positions, int(positions[0, -1]) + 1 - len(input_tokens)


class Float32Head(UnquantizedEmbeddingMethod):
    """An output head whose logits are float32, as the trainer's."""

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if bias is not None:
            raise ValueError("no family here has an output head with a bias")
        return float32_logits(x, layer.weight)


_register = MULTIMODAL_REGISTRY.register_processor(NoProcessor, info=MediaInfo, dummy_inputs=NoDummyMedia)


@_register
class MediaQwen2(TakesMedia, Qwen2ForCausalLM):
    """Qwen2, Qwen2.5 and the LLMs of LongVILA and Qwen2.5-VL."""


@_register
class MediaQwen3(TakesMedia, Qwen3ForCausalLM):
    """Qwen3."""


@_register
class MediaQwen3Vl(TakesMedia, Qwen3LLMForCausalLM):
    """The LLM of Qwen3-VL: a media row is an embedding, then for each of the first layers what is added behind it.

    config.num_deepstack: how many layers. What they add to the tokens of a step waits in a buffer, where captured
    steps read it too; a buffer of the module, so that vLLM keeps it when the weights are thrown away.
    """

    deepstack_LTD: Tensor

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        shape = (
            self.config.num_deepstack, vllm_config.scheduler_config.max_num_batched_tokens, self.config.hidden_size
        )  # fmt: skip
        self.register_buffer("deepstack_LTD", torch.zeros(shape), persistent=False)
        self.num_filled = 0  # tokens of the last step that had media; behind them the buffer is 0

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Tensor | None = None
    ) -> Tensor:
        self.deepstack_LTD[:, : self.num_filled] = 0
        self.num_filled = 0
        if not multimodal_embeddings:
            return super().embed_input_ids(input_ids)
        width = self.config.hidden_size
        levels_NLD = torch.cat([rows[:, width:] for rows in multimodal_embeddings]).unflatten(
            1, (len(self.deepstack_LTD), width)
        )
        self.num_filled = len(input_ids)
        self.deepstack_LTD[:, : self.num_filled][:, is_multimodal] = levels_NLD.transpose(0, 1)
        own = [rows[:, :width] for rows in multimodal_embeddings]
        return super().embed_input_ids(input_ids, own, is_multimodal=is_multimodal)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        levels_LtD = self.deepstack_LTD[:, : positions.shape[-1]]
        added = IntermediateTensors({f"deepstack_input_embeds_{at}": level for at, level in enumerate(levels_LtD)})
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds, deepstack_input_embeds=added)


ARCHITECTURES = (MediaQwen2, MediaQwen3, MediaQwen3Vl)
"""config.json names one of them in `architectures`."""


@dataclass
class BucketInit(WeightTransferInitInfo):
    """How buckets come. nccl: the group to join (see vLLM's NCCLWeightTransferInitInfo)."""

    transport: str
    nccl: dict[str, Any] | None = None


@dataclass
class BucketInfo(WeightTransferUpdateInfo):
    """A bucket: what is in its bytes and where they are."""

    manifest: Manifest
    num_bytes: int
    place: Any = None  # file: a path; ipc: GPU uuid and arguments of rebuild_cuda_tensor; nccl: None


class BucketTransfer(WeightTransferEngine[BucketInit, BucketInfo]):
    """Takes buckets one by one and loads them; a wrong checksum is refused by finish_weight_update.

    Over NCCL no bucket may be refused on arrival: the trainer would wait forever in the broadcast of the next.
    """

    init_info_cls = BucketInit
    update_info_cls = BucketInfo

    def init_transfer_engine(self, init_info: BucketInit) -> None:
        self.transport = Transport(init_info.transport)
        self.group = None
        self.shared: Tensor | None = None
        self.shared_place: Any = None
        if self.transport is Transport.nccl:
            info = NCCLWeightTransferInitInfo(**init_info.nccl)
            self.group = worker_init_process_group(info, self.parallel_config)

    def start_weight_update(self) -> None:
        self.checksums: list[Tensor] = []
        self.error: Exception | None = None
        # On a GPU the parameters are what the layers compute with and are written in place. On the CPU layers keep a
        # packed copy, which only vLLM's reloading makes anew, of layers whose weights all come.
        self.layerwise = self.device.type == "cpu"
        if self.layerwise:
            initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # Without the base class's wait for the device: the next bucket may be on its way while this one is loaded.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: BucketInfo) -> None:
        packed = self._receive(update_info)
        tensors = unpack_bucket(packed, update_info.manifest)
        self.checksums.append(tensor_checksums(tensors.values()))
        if self.error is not None:
            return
        try:
            self.model.load_weights(tensors.items())
        except Exception as error:  # noqa: BLE001 - told to the trainer by finish_weight_update, see above
            self.error = error

    def _receive(self, info: BucketInfo) -> Tensor:
        """[num_bytes] uint8."""
        if self.transport is Transport.file:
            return torch.from_file(info.place, shared=True, size=info.num_bytes, dtype=torch.uint8).clone()
        if self.transport is Transport.ipc:
            packed = self._shared(info.place)[: info.num_bytes].to(self.device, copy=True)
            torch.cuda.current_stream().synchronize()  # when this is answered, the trainer writes the next one there
            return packed
        packed = torch.empty(info.num_bytes, dtype=torch.uint8, device=self.device)
        self.group.broadcast(packed, src=0, stream=torch.cuda.current_stream())
        return packed

    def _shared(self, place: tuple[str, tuple[Any, ...]]) -> Tensor:
        """The trainer's buffer: the UUID of its GPU and what rebuild_cuda_tensor takes. It is the same for long."""
        if place != self.shared_place:
            uuid, arguments = place
            devices = range(torch.cuda.device_count())
            (index,) = [at for at in devices if str(torch.cuda.get_device_properties(at).uuid) == uuid]
            # The sender counts its GPUs in its own way. Another GPU of this engine copies from there.
            self.shared, self.shared_place = rebuild_cuda_tensor(*arguments[:6], index, *arguments[7:]), place
        return self.shared

    def finish_weight_update(self) -> None:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        if self.layerwise:
            finalize_layerwise_reload(self.model, self.model_config)
        if self.transport is Transport.ipc:
            torch.cuda.empty_cache()  # what buckets were copied to: keys and values wake up next

    def check(self, expected: list[list[int]]) -> str | None:
        """What is wrong with the update that was just finished; None: nothing."""
        if self.error is not None:
            return f"vLLM could not load the weights: {type(self.error).__name__}: {self.error}"
        received = [checksums_n.tolist() for checksums_n in self.checksums]
        if len(received) != len(expected):
            return f"{len(received)} of {len(expected)} buckets arrived"
        if received != expected:
            wrong = [index for index, pair in enumerate(zip(received, expected, strict=True)) if pair[0] != pair[1]]
            return f"a bucket's checksum is wrong (after the transfer; number {wrong[:3]} of {len(expected)})"
        return None

    def shutdown(self) -> None:
        self.group = None

    @staticmethod
    def trainer_send_weights(iterator: Iterable[Any], trainer_args: Any) -> None:
        raise TypeError("megalong.rollout.vllm_engine sends the buckets")


class WorkerExtension:
    """Methods that vllm_server calls on every worker by collective_rpc."""

    def open_media(self, path: str, rows: int, width: int) -> None:
        """Map the embeddings of the next prompts: [rows, width] in the model's dtype.

        They stay mapped: the file is the same the next time.
        """
        model = self.model_runner.get_model()
        if model.media_file != (path, rows):
            dtype = next(model.parameters()).dtype
            model.media_ND = torch.from_file(path, shared=True, size=rows * width, dtype=dtype).view(rows, width)
            model.media_file = (path, rows)

    def close_media(self) -> None:
        """Before that file is deleted: memory that is mapped would stay the host's."""
        model = self.model_runner.get_model()
        model.media_ND = model.media_file = None

    def pay_no_heed_to_sigterm(self) -> None:
        """vLLM's workers end at it; Slurm tells every process, and the trainer ends its step and saves first."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def check_update(self, checksums: list[list[int]]) -> str | None:
        return self.weight_transfer_engine.check(checksums)


for _class in ARCHITECTURES:
    ModelRegistry.register_model(_class.__name__, _class)
WeightTransferEngineFactory.register_engine(TRANSFER_BACKEND, BucketTransfer)
