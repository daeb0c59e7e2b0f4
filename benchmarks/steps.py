"""What the benchmarks of training steps share: a model of random weights, random groups, timed steps, several runs.

The steps are the trainer's own: VisionStage, pack_rollouts, the GRPO loss without KL, megatron's layers, the optimizer.
Weights are random numbers made on the device (the same for every layout), frames random bytes in the stage's store.
The learning rate is 0, so that every step of a run starts from the same weights.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megalong.config import costs
from megalong.config.load import load_config
from megalong.config.shapes import read_model_shape
from megalong.config.tree import SHARDED, Recompute, RunConfig
from megalong.data.packing import pack_rollouts
from megalong.engine.build import build_model
from megalong.engine.trainer import LossOf, Trainer
from megalong.grpo import grpo_loss, loss_settings, tokens_of
from megalong.models.longvila.layout import SquareFrames
from megalong.models.policy import PolicyModel
from megalong.parallel.collectives import gather_objects
from megalong.parallel.layout import ParallelLayout
from megalong.parallel.offload import BLOCK_BYTES
from megalong.records import FrameSelection, PolicyBatch, Prompt, RolloutGroup, Sample
from megalong.run import layout_of
from megalong.videos import vision_settings
from megalong.vision.encode import VisionStage

SHAPES = Path(__file__).parents[1] / "launch" / "shapes" / "longvila_7b"
TINY = {
    "llm": {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 96,
            "vocab_size": 320},
    "vision_tower": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48,
                     "image_size": 56},
    "mm_projector": {},
}  # fmt: skip
"""What --tiny puts in place of the 7B sizes."""
RECIPE = """
model: {path: none, dtype: bfloat16, recompute: keep_attention}
video: {decoder: pyav, frame_cache_gib: 64, cache_gib: 256}  # nothing is decoded
grpo: {kl_coef: 0.0}
optimizer: {lr: 0.0, weight_decay: 0.0}
logger: {run_dir: none, tensorboard: false}
"""
REPEATED = ("none", "stage1", "stage1+2")
"""Values of mr_sp.mode in which every response carries its own prompt."""
PEAK = 780e12
"""bf16 FLOP/s of an H200 in a large matrix product, measured: what MFU is a share of."""


def make_folder(folder: Path, *, layers: int, tiny: bool) -> Path:
    """A recipe, and the JSON files of the shipped 7B shapes with another number of layers, or tiny ones."""
    shutil.copytree(SHAPES, folder / "model")
    for name in TINY:
        file = folder / "model" / name / "config.json"
        changes = {**(TINY[name] if tiny else {}), **({"num_hidden_layers": layers} if name == "llm" else {})}
        content = json.loads(file.read_text())
        file.chmod(0o644)
        file.write_text(json.dumps({**content, **changes}))
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def random_tensor(name: str, shape: Sequence[int], *, device: torch.device) -> Tensor:
    """bfloat16 values that depend on the name alone: 0.02 times a normal number, around 1 for norms.

    As Megatron begins: what a layer of 28 adds to the residual stream is scaled down by the root of 2 x 28.
    """
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    scale = 0.02 / 56**0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
    values = torch.randn(tuple(shape), dtype=torch.float32, device=device, generator=generator).mul_(scale)
    if len(shape) == 1 and not name.endswith("bias"):
        values += 1
    return values.to(torch.bfloat16)


@torch.no_grad()
def fill_randomly(model: PolicyModel, layout: ParallelLayout) -> None:
    """Random weights by their Hugging Face names, so that they do not depend on the layout."""
    parameters = dict(model.named_parameters())
    for entry in model.weight_table():
        target = parameters[entry.megatron]
        shapes = entry.join([torch.empty(target.shape, device="meta")] * layout.tp_size)
        tensors = [
            random_tensor(name, like.shape, device=layout.device) for name, like in zip(entry.hf, shapes, strict=True)
        ]
        target.copy_(entry.cut(tensors, rank=layout.tp_rank, size=layout.tp_size))


class Watch:
    """Seconds of the phases of a step, the device's work included."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._phase, self._since = "", 0.0

    def enter(self, phase: str) -> None:
        """The phase so far ends here; "" starts none."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._phase:
            self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase, now


class TimedTrainer(Trainer):
    """The trainer with a watch beside it: vision, forward, backward, gradient sums, optimizer."""

    def __init__(self, *args: Any, watch: Watch, **options: Any) -> None:
        super().__init__(*args, **options)
        self.watch = watch
        self.ddp.register_forward_pre_hook(lambda *_: watch.enter("forward"))

    def _finish_gradients(self) -> None:
        self.watch.enter("gradient sums")
        super()._finish_gradients()
        self.watch.enter("optimizer")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A group: one prompt of frames and text, and its responses. Tokens unless said."""

    frames: int
    text: int
    group: int
    response: int
    seed: int = 1  # of tokens and advantages

    def prompt(self, tokens_per_frame: int) -> int:
        return self.frames * tokens_per_frame + self.text


class Bench:
    """One model on one layout. Every rank calls the same methods.

    folder: of make_folder. vision: with the tower and the projector, or the decoder alone (family qwen2).
    """

    def __init__(self, folder: Path, overrides: Sequence[str], *, vision: bool) -> None:
        self.folder = folder
        path = folder / "model"
        where = [f"model.path={path}"] if vision else [f"model.path={path / 'llm'}", "model.family=qwen2"]
        self.load = lambda *more: load_config(folder / "recipe.yaml", [*where, *overrides, *more])
        self.config: RunConfig = self.load()
        self.shape = read_model_shape(self.config.model.path, family=self.config.model.family, video=self.config.video)
        self.layout = layout_of(self.config, self.shape)
        self.watch = Watch(self.layout.device)
        self.stages: dict[str, VisionStage] = {}

    @cached_property
    def trainer(self) -> TimedTrainer:
        """Made when it is first needed: with its gradients and optimizer states."""
        parallel = self.config.parallel
        model = build_model(self.config.model, self.layout, sequence_parallel=parallel.sequence_parallel, load=False)
        fill_randomly(model, self.layout)
        return TimedTrainer(
            model, self.layout, self.config.optimizer, total_steps=1, embeddings=None, watch=self.watch
        )  # fmt: skip

    def use(self, mode: str, recompute: str) -> None:
        """Let the trainer's next passes share what mr_sp.mode says; recompute: keep_attention or full."""
        stage = self.stage(mode)

        def embeddings(*args: Any, **options: Any) -> Tensor | None:
            self.watch.enter("vision")
            return stage.embeddings(*args, **options)

        self.trainer.runner = replace(self.trainer.runner, sharded=mode in SHARDED, embeddings=embeddings)
        self.trainer.keep_attention = recompute == "keep_attention"

    def stage(self, mode: str) -> VisionStage:
        if mode not in self.stages:
            model = self.trainer.model
            vision = self.shape.vision
            videos = vision and SquareFrames(
                size=model.spec.vision.image_size, tokens_per_frame=vision.embeds_per_frame, newline_id=0
            )
            settings = vision_settings(self.load(f"mr_sp.mode={mode}"))
            self.stages[mode] = VisionStage(model.vision, self.layout, settings, videos=videos)
        return self.stages[mode]

    def selection(self, frames: int) -> FrameSelection:
        """A video that no decoder ever sees; its file is there to have a key."""
        path = self.folder / f"{frames}.mp4"
        if self.layout.is_main:
            path.write_text(str(frames))
        dist.barrier()
        numbers = tuple(range(frames))
        side = self.trainer.model.spec.vision.image_size
        return FrameSelection(
            path=str(path), frames=numbers, seconds=tuple(map(float, numbers)), height=side, width=side
        )

    def packs(self, case: Case, *, mode: str) -> list[PolicyBatch]:
        """The group's packs with the case's random tokens and advantages."""
        generator = torch.Generator().manual_seed(case.seed)
        draw = lambda count: torch.randint(self.shape.vocab, (count,), generator=generator).tolist()  # noqa: E731
        selections = (self.selection(case.frames),) if case.frames else ()
        layout = self.stage(mode).videos
        ids = [*(token for item in selections for token in layout.video_ids(item)), *draw(case.text)]
        prompt = Prompt(
            sample=sample_of(selections), ids_P=tuple(ids), selections=selections,
            positions_P=torch.arange(len(ids)), next_position=len(ids),
        )  # fmt: skip
        responses = tuple(tuple(draw(case.response)) for _ in range(case.group))
        rollout = RolloutGroup(
            prompt=prompt,
            response_ids=responses,
            logprobs=tuple((0.0,) * case.response for _ in responses),  # the logged gap is then the mean -logprob
            texts=("",) * case.group,
            truncated=(False,) * case.group,
            weights_version=0,
        )
        advantages_G = torch.randn(case.group, generator=generator)
        return pack_rollouts([rollout], [advantages_G], pack_tokens=1, share_prefix=mode not in REPEATED)

    def loss(self, batches: Sequence[PolicyBatch], seen: dict[int, Tensor] | None = None) -> LossOf:
        """grpo's loss; `seen` takes the log-probabilities of each pack that this rank scores, by its index."""
        loss_of = grpo_loss(self, batches, loss_settings(self.config))

        def timed(index: int, logprobs_R: Tensor, entropy_R: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            result = loss_of(index, logprobs_R, entropy_R)
            if seen is not None:
                seen[index] = logprobs_R.detach().float().cpu()
            self.watch.enter("backward")
            return result

        return timed

    def step(self, batches: Sequence[PolicyBatch], *, mode: str, recompute: str) -> dict[str, Any]:
        """One train step from frames to new weights: seconds by phase (of the slowest rank), what came out, peak."""
        self.use(mode, recompute)
        stage, device = self.stage(mode), self.layout.device
        selections = {item.path: item for batch in batches for item in batch.tokens.selections}
        for item in selections.values():
            self._put_frames(stage, item)
        reset_peak(device)
        dist.barrier()
        self.watch.seconds = {}
        self.watch.enter("vision")
        if selections:
            stage.prepare([sample_of(tuple(selections.values()))], selections)
        self.watch.enter("prepare")
        seen: dict[int, Tensor] = {}
        stats = self.trainer.train_step(tokens_of(batches), self.loss(batches, seen), temperature=1.0)
        self.watch.enter("")
        everyone = gather_objects((self.watch.seconds, peak_gb(device), seen), group=self.layout.world)
        phases = {name: max(part.get(name, 0.0) for part, _, _ in everyone) for name in self.watch.seconds}
        for _, _, part in everyone:  # where packs are whole, a rank scores some of them
            seen |= part
        return {
            "seconds": max(sum(part.values()) for part, _, _ in everyone),
            "phases": phases,
            "peak_gb": [peak for _, peak, _ in everyone],
            "loss": stats.loss,
            "grad_norm": stats.grad_norm,
            "mean_nll": stats.metrics["sampler_gap_sum"],
            "logprobs": some_of(torch.cat([seen[index] for index in sorted(seen)]).tolist()),
        }

    def _put_frames(self, stage: VisionStage, selection: FrameSelection) -> None:
        """This rank's share of random frames, as if just decoded; embeddings of an earlier step are forgotten."""
        stage.embeds.clear()
        if stage.key(selection) in stage.frames:
            return
        first, last = stage._share(selection)
        shape = (selection.height, selection.width, 3)  # a frame's bytes do not depend on the rank that has it
        frames = [np.random.default_rng(index).integers(0, 256, shape, np.uint8) for index in range(first, last)]
        frames_FHWC = np.stack(frames) if frames else np.empty((0, *shape), np.uint8)
        stage.frames.put(stage.key(selection), frames_FHWC, num_bytes=frames_FHWC.nbytes)

    def flops(self, case: Case, *, mode: str, recompute: str) -> int:
        """Of the LLM's forward and backward over all ranks, by config.costs; recompute `none` leaves repeats out."""
        prompt = case.prompt(self.shape.vision.tokens_per_frame if self.shape.vision else 0)
        work = (costs.repeated_work if mode in REPEATED else costs.shared_work)(prompt, case.response, case.group)
        return costs.train_flops(self.shape, work, recompute=Recompute[recompute])

    def recompute_for(self, case: Case, *, mode: str, memory_gb: float) -> str:
        """keep_attention when it is estimated to fit into a GPU's memory, else full."""
        layout = self.layout
        params = costs.llm_params_per_rank(self.shape, tp=layout.tp_size, pp=layout.pp_size)
        states = 6 * params + 12 * params // (layout.context.size * layout.dp_size)
        rows = self._rows(case, mode=mode)
        live = costs.live_bytes_per_token(self.shape, **self._split)
        mlp = costs.mlp_bytes_per_row(self.shape, element=2, tp=layout.tp_size) * min(rows, costs.MLP_ROWS)
        total = states + rows * (self._kept_bytes(Recompute.keep_attention) + live) + mlp
        return "keep_attention" if total < memory_gb * 1e9 else "full"

    def page_lock(self, case: Case, *, mode: str, recompute: str) -> None:
        """Take the host memory of the case's offloaded activations, as the first step of its length would do: torch
        keeps it."""
        if self.config.model.offload_activations:
            count = self._rows(case, mode=mode) * self._kept_bytes(Recompute[recompute]) // BLOCK_BYTES
            held = [torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(count)]
            del held  # all at once: one block after the other would be the same one

    @property
    def _split(self) -> dict[str, Any]:
        return {"tp": self.layout.tp_size, "sequence_parallel": self.config.parallel.sequence_parallel, "element": 2}

    def _kept_bytes(self, recompute: Recompute) -> int:
        """Of a token on a rank, by all layers."""
        return costs.kept_bytes_per_token(self.shape, recompute=recompute, **self._split) * self.shape.layers

    def _rows(self, case: Case, *, mode: str) -> int:
        """Tokens of a pack on a rank."""
        prompt = case.prompt(self.shape.vision.tokens_per_frame if self.shape.vision else 0)
        rows = prompt + case.response * (1 if mode in REPEATED else case.group)
        return rows // (self.layout.context.size if mode in SHARDED else 1)

    def close(self) -> None:
        for stage in self.stages.values():
            stage.close()
        self.__dict__.pop("trainer", None)
        self.stages.clear()
        free(self.layout.device)


def some_of(values: list[float]) -> list[float]:
    """About 64 of them, evenly spaced: what a row keeps for comparisons."""
    return values[:: max(1, len(values) // 64)]


def sample_of(selections: Sequence[FrameSelection]) -> Sample:
    return Sample(
        sample_id="random", question="", answer="", videos=tuple(item.path for item in selections),
        problem_type="multiple choice", category="", reasoning="", subtitles="",
    )  # fmt: skip


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gb(device: torch.device) -> float:
    """Most memory held by tensors since reset_peak; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_out_of_memory(error: RuntimeError) -> bool:
    """torch's own error, and those of libraries that allocate beside it (NCCL, cuBLAS, Triton)."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        text in str(error) for text in ("out of memory", "ALLOC_FAILED")
    )


def parser_of(doc: str) -> argparse.ArgumentParser:
    """The options that every script has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--length", type=int, help="tokens of a response (512; 8 with --tiny)")
    parser.add_argument("--layers", type=int, help="layers of the LLM")
    parser.add_argument("--seconds", type=float, default=540, help="time for everything")
    parser.add_argument(
        "--max-seconds", type=float, default=120, help="longest step; estimated longer ones are not run"
    )
    parser.add_argument("--overrides", nargs="*", default=[], metavar="a.b=c", help="of the configuration")
    parser.add_argument("--json", help="file for the rows")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the script on a CPU")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # sessions.drive passes it to the processes it starts
    return parser


def parallel_overrides(*, gpus: int, tp: int = 1, cp_a2a: int = 0) -> list[str]:
    """One replica over all GPUs: tp, and context parallelism over the rest."""
    parts = {"tp": tp, "cp": gpus // tp, "cp_a2a": cp_a2a, "sequence_parallel": str(tp > 1).lower()}
    return [f"parallel.{name}={value}" for name, value in parts.items()]


def machine() -> dict[str, str]:
    """What rows are measured with."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
    }


def save(path: str | None, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows as JSON where --json says, whole or not at all."""
    if path:
        file = Path(f"{path}.{os.getpid()}")
        file.write_text(json.dumps({**machine(), "rows": list(rows)}, indent=1))
        file.replace(path)
