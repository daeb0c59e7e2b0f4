"""The vLLM rollout engine as the trainer sees it: a process of its own, on GPUs of its own or on the trainer's."""

from __future__ import annotations

import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from megalong.records import WeightBucket
from megalong.rollout.engine import Request, RolloutEngineError, Sampled, Sampling
from megalong.rollout.process_group import end_group
from megalong.rollout.shared_memory import BucketRoom, MediaRoom, engine_folder
from megalong.rollout.transfer import Transport, manifest_of, packed_bytes
from megalong.rollout.vllm_model import write_config
from megalong.rollout.weight_check import Update, WeightCheck

SERVER = "megalong.rollout.vllm_server"
"""Module that the engine's process runs."""

_LOOK_SECONDS = 0.5  # between two looks at the engine's process while a collective with it is under way
_LOG_LINES = 15
_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True, slots=True)
class VllmSettings:
    """Plain values of an engine."""

    devices: tuple[str, ...]  # of CUDA_VISIBLE_DEVICES, one per tensor-parallel rank; () for the CPU
    transport: Transport
    max_tokens: int  # of a prompt and its response
    prefill_tokens: int  # tokens of a step of the engine
    max_sequences: int  # responses sampled at a time
    memory_share: float  # of a GPU's (or the host's) memory, weights included
    cuda_graphs: bool
    processed_logprobs: bool  # log-probabilities at the sampling temperature, not at 1
    sleeps: bool  # release() gives GPU memory back
    discard_weights: bool  # and throws the weights away: the update behind it holds all of them
    start_seconds: float  # that loading vLLM, building the model and capturing graphs may last
    timeout_seconds: float  # that any other call may last
    log_file: Path
    seed: int


@dataclass(kw_only=True, slots=True)
class _Sent:
    """What was sent of an update. Checksums stay on their device: waiting for each would stop the stream of buckets."""

    checksums: list[Tensor] = field(default_factory=list)  # [n] of each bucket
    unanswered: int = 0


class VllmEngine:
    """See RolloutEngine. `model` gives sizes and names and may be on the meta device; its weights are not used.

    name_of: as EmbeddedEngine's. Raises RolloutEngineError when the engine's process ends, fails or does not answer.
    """

    def __init__(
        self, model: PreTrainedModel, *, name_of: Callable[[str], str | None], eos_id: int, settings: VllmSettings
    ) -> None:
        self.settings = settings
        self.weights = WeightCheck(model, name_of=name_of)
        # Of an embedding and the deepstack levels behind it.
        self.width = model.config.hidden_size * (1 + getattr(model.config, "num_deepstack", 0))
        self.dtype = model.dtype
        self.has_mrope = "mrope_section" in (model.config.rope_parameters or {})
        self.counts = {"prefilled_tokens": 0, "handover_seconds": 0.0}
        self._asleep = False
        self._begun: Any = None  # requests, from begin() to finish()
        self._group: Any = None  # of NCCL, with the engine's workers
        self._answers: list[Any] = []  # results that came while a collective was under way
        self._folder, self._held = engine_folder()
        self._room = BucketRoom(settings.transport, self._folder)
        self.media = MediaRoom(
            self._folder, width=self.width, dtype=self.dtype, let_go=lambda: self._call("close_media")
        )
        try:
            write_config(model, self._folder, max_tokens=settings.max_tokens, eos_id=eos_id)
        except OSError as error:
            shutil.rmtree(self._folder, ignore_errors=True)
            what = f"cannot be written for the rollout engine ({error.strerror}); free memory there"
            raise RolloutEngineError(f"{self._folder}: {what}") from error
        self._connection = self._start()
        try:
            self._call("start", folder=str(self._folder), eos_id=eos_id, settings=self._llm_settings())
            self._init_transfer()
        except BaseException:
            self.close()
            raise

    @property
    def version(self) -> int:
        return self.weights.version

    def load_weights(self, buckets: Iterable[WeightBucket], *, version: int) -> None:
        """See RolloutEngine. While the engine loads a bucket, the next one is gathered (and by NCCL sent)."""
        self._make_room()
        # On the CPU vLLM keeps packed copies of whole layers (BucketTransfer.start_weight_update).
        update = self.weights.begin(version, again=self.needs_weights, in_parts=bool(self.settings.devices))
        self._call("start_update")
        sent = _Sent()
        try:
            for bucket in buckets:
                self._send_bucket(bucket, update, sent)
                del bucket  # its memory is the next one's, or the engine's
        except RolloutEngineError:
            raise
        except Exception:
            if self._process.poll() is None:
                self._finish_update(sent)  # for the engine it is over
            raise
        update.end(self._finish_update(sent))

    def _send_bucket(self, bucket: WeightBucket, update: Update, sent: _Sent) -> None:
        chosen = update.of(bucket)
        if not chosen.tensors:
            return
        manifest = manifest_of(chosen.tensors)
        if self.settings.transport is not Transport.nccl:
            self._answer_all(sent)  # until then the engine reads the last bucket, where this one goes
        num_bytes = packed_bytes(manifest)
        packed = self._room.pack(chosen.tensors, num_bytes=num_bytes)
        sent.checksums.append(chosen.checksums_n)
        self._send("update", {"manifest": manifest, "num_bytes": num_bytes, "place": self._room.place(packed)})
        sent.unanswered += 1
        if self.settings.transport is Transport.nccl:
            self._together("update", lambda: self._room.broadcast(packed, self._group))
            self._answer_all(sent, but=1)

    def _answer_all(self, sent: _Sent, *, but: int = 0) -> None:
        while sent.unanswered > but:
            self._answer("update")
            sent.unanswered -= 1

    def _finish_update(self, sent: _Sent) -> str | None:
        """What is wrong with the update that was sent."""
        self._answer_all(sent)
        self._room.end_update()
        self._make_room()  # keys and values wake up where the buckets were gathered
        wrong = self._call("finish_update", [checksums_n.tolist() for checksums_n in sent.checksums])
        self._asleep = False
        return wrong

    def begin(self, requests: Sequence[Request], *, sampling: Sampling) -> None:
        """See RolloutEngine. Embeddings that requests share are handed over once, the keys and values computed once."""
        self._require_idle("generate")
        self.weights.require()
        for request in requests:
            self._check(request, group_size=sampling.group_size)
        if self._asleep:
            self._make_room()
            self._call("wake")
            self._asleep = False
        started = time.perf_counter()
        media, first_rows = self.media.write([request.embeds_ND for request in requests])
        self.counts["handover_seconds"] += time.perf_counter() - started
        stripped = [replace(request, embeds_ND=None) for request in requests]
        self._send("generate", stripped, sampling=sampling, media=media, first_rows=first_rows)
        self._begun = stripped

    def finish(self) -> list[list[Sampled]]:
        """See RolloutEngine."""
        requests, self._begun = self._begun, None
        groups, cached = self._answer("generate")
        self.counts["prefilled_tokens"] += sum(
            len(request.ids_P) - reused for request, group in zip(requests, cached, strict=True) for reused in group
        )
        return groups

    def generate(self, requests: Sequence[Request], *, sampling: Sampling) -> list[list[Sampled]]:
        """See RolloutEngine."""
        self.begin(requests, sampling=sampling)
        return self.finish()

    def release(self) -> None:
        """Give the GPU's memory back until the next load_weights (or generate, when weights are kept)."""
        if not self.settings.sleeps or self._asleep:
            return
        self._call("sleep", level=2 if self.settings.discard_weights else 1)
        self._asleep = True

    @property
    def shares_gpus(self) -> bool:
        """Whether it is on the trainer's GPUs."""
        return self.settings.transport is Transport.ipc

    @property
    def asleep(self) -> bool:
        """Whether release() put it to sleep."""
        return self._asleep

    @property
    def needs_weights(self) -> bool:
        """Whether release() threw the weights away."""
        return self._asleep and self.settings.discard_weights

    def _make_room(self) -> None:
        """Before the engine wakes up: what the trainer has let go of is the engine's."""
        if self._asleep:
            torch.cuda.empty_cache()

    def close(self) -> None:
        """End the process, and its workers."""
        self.media.close()
        self._connection.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._kill()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._held.close()

    def _check(self, request: Request, *, group_size: int) -> None:
        request.check(group_size=group_size)
        length = len(request.ids_P)
        counted = torch.arange(length).expand_as(request.positions_P)
        if (request.embeds_ND is None or not self.has_mrope) and not torch.equal(request.positions_P, counted):
            raise ValueError("the prompt's positions do not count up from 0, as those of this model must")
        if request.embeds_ND is not None and request.embeds_ND.shape[1] != self.width:
            raise ValueError(f"embeddings are {request.embeds_ND.shape[1]} wide, expected {self.width}")
        if length >= self.settings.max_tokens:
            raise ValueError(
                f"the prompt has {length} tokens and the engine was made for {self.settings.max_tokens} with the "
                "response; raise data.max_prompt_tokens"
            )

    def _llm_settings(self) -> dict[str, Any]:
        settings = self.settings
        graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"} if settings.cuda_graphs else None
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            "tensor_parallel_size": max(1, len(settings.devices)),
            "max_model_len": settings.max_tokens,
            "max_num_batched_tokens": settings.prefill_tokens,
            "max_num_seqs": settings.max_sequences,
            "gpu_memory_utilization": settings.memory_share,
            "enforce_eager": not settings.cuda_graphs,
            "enable_sleep_mode": settings.sleeps,
            "logprobs_mode": "processed_logprobs" if settings.processed_logprobs else "raw_logprobs",
            "seed": settings.seed,
            "disable_log_stats": True,
            **({"compilation_config": graphs} if graphs else {}),
        }

    def _init_transfer(self) -> None:
        transport = self.settings.transport
        if transport is not Transport.nccl:
            self._call("init_transfer", {"transport": transport.value})
            return
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

        place = {"master_address": "127.0.0.1", "master_port": _free_port()}
        size = 1 + len(self.settings.devices)
        self._send(
            "init_transfer", {"transport": transport.value, "nccl": {**place, "rank_offset": 1, "world_size": size}}
        )
        self._group = self._together(
            "init_transfer", lambda: NCCLWeightTransferEngine.trainer_init({**place, "world_size": size})
        )
        self._answer("init_transfer")

    def _together(self, method: str, collective: Callable[[], Any]) -> Any:
        """The trainer's part of a collective that the engine was told to take part in.

        It runs on a thread: a collective whose other side is gone may wait for ever, and cannot be called off. Whatever
        ends it early, here or there, ends the engine, which cannot be called off either.
        """
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        done: Future[Any] = Future()

        def run() -> None:
            try:
                if device is not None:
                    torch.cuda.set_device(device)
                done.set_result(collective())
            except BaseException as error:  # noqa: BLE001 - raised again below
                done.set_exception(error)

        try:
            threading.Thread(target=run, name="collective", daemon=True).start()
            while not wait([done], timeout=_LOOK_SECONDS).done:
                while self._connection.poll():
                    self._answers.append(self._receive(method))
                self._require_alive(method)
            return done.result()
        except BaseException:
            self._kill()
            raise

    def embeds_room(self, rows: int) -> Tensor:
        """See RolloutEngine. What was written there for the last requests is overwritten."""
        self._require_idle("embeds_room")
        return self.media.rows(rows)

    def _start(self) -> Connection:
        environment = {name: value for name, value in os.environ.items() if name not in _TORCHRUN}
        environment = {name: value for name, value in environment.items() if not name.startswith("TORCHELASTIC")}
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(self.settings.devices)
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        self.settings.log_file.parent.mkdir(parents=True, exist_ok=True)
        ours, theirs = Pipe()
        with theirs, self.settings.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", SERVER, str(theirs.fileno()), str(os.getpid()), str(self._folder)],
                env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                # Signals of torchrun and Ctrl-C go to all of the trainer's session, which ends its step first.
                start_new_session=True,
            )  # fmt: skip
        return ours

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        self._send(method, *args, **kwargs)
        return self._answer(method)

    def _require_idle(self, method: str) -> None:
        """It reads its embeddings while it samples, and its next answer is that of generate()."""
        if self._begun is not None:
            raise RuntimeError(f"{method}() was asked of an engine that samples; call finish() first")

    def _send(self, method: str, *args: Any, **kwargs: Any) -> None:
        self._require_idle(method)
        try:
            # Not send(): torch teaches it to share tensors, by handles that end with this process.
            self._connection.send_bytes(pickle.dumps((method, args, kwargs)))
        except OSError as error:
            raise self._failure(method, "hung up") from error

    def _answer(self, method: str) -> Any:
        if self._answers:
            return self._answers.pop(0)
        limit = self.settings.start_seconds if method == "start" else self.settings.timeout_seconds
        started = time.monotonic()
        while not self._connection.poll(1.0):
            self._require_alive(method)
            if time.monotonic() - started > limit:
                self._kill()
                raise self._failure(method, f"did not answer within {limit:.0f} s; see parallel.timeout_minutes")
        return self._receive(method)

    def _receive(self, method: str) -> Any:
        """The result that the engine has sent."""
        try:
            done, result = pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise self._failure(method, "ended") from error
        if not done:
            raise self._failure(method, f"failed:\n{result}")
        return result

    def _kill(self) -> None:
        """End the process and its workers at once, and the trainer's waiting for them in NCCL."""
        with suppress(ProcessLookupError):
            end_group(self._process.pid)
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)  # nobody else will, should this process fail, too
        if self._group is not None:
            self._group.destroy()

    def _require_alive(self, method: str) -> None:
        if self._process.poll() is not None:
            raise self._failure(method, "ended")

    def _failure(self, method: str, what: str) -> RolloutEngineError:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=2)  # its exit code, when it is ending
        code = self._process.poll()
        if code is not None:
            self._kill()  # what it leaves behind
        lines = self.settings.log_file.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        return RolloutEngineError(
            f"the vLLM engine (process {self._process.pid}, GPUs {','.join(self.settings.devices) or 'none'}, exit "
            f"code {code}) {what} in {method}(). The end of {self.settings.log_file}:\n" + "\n".join(lines)
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
