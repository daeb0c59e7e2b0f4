"""Run functions in fresh processes that form one world, and the tiny demo that they train on.

Without a GPU, processes are forked from a clean server that has imported megalong once: a world costs milliseconds, not
the imports of each of its processes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed import TCPStore

from megalong.attention.shard import PackShard
from megalong.config.demo_data import DemoDataConfig, DemoQuestionsConfig
from megalong.config.load import load_config
from megalong.config.tree import RunConfig, VideoConfig
from megalong.data.demo_videos import make_demo_data
from megalong.data.manifest import read_manifest
from megalong.data.sequence import THINKING_TEMPLATE, SequenceBuilder
from megalong.engine.trainer import Trainer
from megalong.models.families import FAMILIES
from megalong.models.longvila.demo_checkpoint import DemoModelSize, make_demo_checkpoint
from megalong.records import TokenBatch

SIZE = DemoModelSize(
    hidden=32, layers=2, heads=4, kv_heads=2, intermediate=64, max_positions=1024, vocab=400,
    tower_hidden=16, tower_layers=3, tower_heads=2, tower_intermediate=32, image=16, patch=4,
)  # fmt: skip
BASE = """
model: {dtype: float32, layer_spec: local, recompute: none, train_tower: true, train_projector: true}
video: {num_frames: 5, tower_batch_frames: 3, cache_embeddings: false, cache_gib: 0.1, frame_cache_gib: 0.1}
data: {max_prompt_tokens: 700, max_response_tokens: 150, pack_tokens: 1100, decode_workers: 1}
rollout: {engine: embedded, group_size: 4, batch_prompts: 2}
reward: {weights: {accuracy: 0.9, format: 0.1}}
# Gradients that are zero but for rounding (key biases of the tower) stay small beside this eps.
optimizer: {lr: 3.0e-3, eps: 1.0e-4, schedule: cosine, warmup_steps: 1, clip_grad: 1.0}
sft: {steps: 3, batch_size: 4}
grpo: {steps: 2, batch_size: 4}
checkpoint: {save_every: 0}
logger: {tensorboard: false, samples_per_step: 1000}
"""
FROZEN_VISION = ("model.train_tower=false", "model.train_projector=false", "video.cache_embeddings=true")


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoWorld:
    """Paths of the tiny demo."""

    folder: Path
    recipe: Path
    tied: Path  # another checkpoint: the same, but the embedding is the head
    sft: Path  # manifest
    rl: Path
    pairs: Path  # of rl, two questions about a video

    def overrides(self, run_dir: Path, *, task: str) -> list[str]:
        """Where the model, the data and the run folder are; SFT trains the vision side, GRPO keeps it frozen."""
        where = [f"data.train={self.sft if task == 'sft' else self.rl}", f"logger.run_dir={run_dir}"]
        # A penalty on length: random weights never earn another reward, and without spread nothing is learnt.
        grpo = [*FROZEN_VISION, "data.max_response_tokens=24", "reward.overlong_buffer=24", "optimizer.lr=2e-3"]
        return where if task == "sft" else [*where, *grpo]

    def config(self, run_dir: Path, *overrides: str, task: str) -> RunConfig:
        return load_config(self.recipe, [*self.overrides(run_dir, task=task), *overrides])


def make_demo_world(folder: Path) -> DemoWorld:
    """Eight questions per manifest about short videos, and a checkpoint whose vocabulary is odd."""
    data = make_demo_data(
        folder / "data",
        DemoDataConfig(questions=DemoQuestionsConfig(train_sft=8, train_rl=8, heldout=1, per_video=1)),
    )
    samples = read_manifest(data.train_sft, video_dir=None)
    texts = [THINKING_TEMPLATE, *(f"{sample.question} {sample.reasoning}" for sample in samples)]
    model = make_demo_checkpoint(folder / "model", texts=texts, size=SIZE)
    _make_vocabulary_odd_and_answers_short(model / "llm")
    tied = _with_tied_head(model, folder / "tied_model")
    recipe = folder / "recipe.yaml"
    recipe.write_text(BASE.replace("model: {", f"model: {{path: {model}, "), encoding="utf-8")
    return DemoWorld(
        folder=folder, recipe=recipe, tied=tied, sft=data.train_sft, rl=data.train_rl, pairs=ask_twice(data.train_rl)
    )


def ask_twice(manifest: Path) -> Path:
    """A manifest of the same questions, two about each of its first videos, which stand apart in it."""
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    paired = [{**line, "videos": lines[index % (len(lines) // 2)]["videos"]} for index, line in enumerate(lines)]
    written = manifest.with_name("pairs.jsonl")
    written.write_text("".join(json.dumps(line) + "\n" for line in paired))
    return written


def make_model_for_vllm(demo: DemoWorld, folder: Path) -> Path:
    """A checkpoint for the demo's questions with wider heads: vLLM's CPU attention has none smaller than 32."""
    texts = [sample.question for sample in read_manifest(demo.rl, video_dir=None)]
    size = DemoModelSize(
        hidden=128, layers=2, intermediate=64, tower_hidden=16, tower_heads=2, tower_intermediate=32, image=16, patch=4
    )
    return make_demo_checkpoint(folder, texts=texts, size=size)


def _make_vocabulary_odd_and_answers_short(llm: Path) -> None:
    """One row more, so that tensor parallelism has to pad; a long row for the end token, so that responses end."""
    config = json.loads((llm / "config.json").read_text())
    tensors = load_file(llm / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat((tensors[name], tensors[name][:1]))
    tensors["lm_head.weight"][config["eos_token_id"]] *= 8
    save_file(tensors, llm / "model.safetensors", metadata={"format": "pt"})
    config["vocab_size"] += 1
    (llm / "config.json").write_text(json.dumps(config))


def _with_tied_head(model: Path, copy: Path) -> Path:
    shutil.copytree(model, copy)
    tensors = load_file(copy / "llm" / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, copy / "llm" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((copy / "llm" / "config.json").read_text())
    (copy / "llm" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    return copy


def make_builder(checkpoint: Path, family: str, *, thinking: bool = False) -> SequenceBuilder:
    """The sequence builder that a run on this checkpoint has; of a family with vision."""
    entry = FAMILIES[family]
    tokens = entry.read_tokens(checkpoint)
    return SequenceBuilder(
        encode=tokens.encode,
        encode_markup=tokens.encode_markup,
        eos_id=tokens.eos_id,
        videos=entry.vision.layout(entry.read_spec(checkpoint), tokens, VideoConfig()),
        system_prompt=tokens.system_prompt,
        thinking=thinking,
    )


class World:
    """Processes that run `function(*args)` under the environment torchrun would give them."""

    def __init__(self, size: int, function: Callable[..., Any], *args: Any, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        # Transformer Engine uses CUDA when it is imported, and what is forked behind that cannot.
        context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
        if not torch.cuda.is_available():
            context.set_forkserver_preload(["megalong.grpo", "megalong.sft"])
        # As torchrun's: bound before its port is told, so that nothing else takes it in between.
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.processes = [
            context.Process(target=_work, args=(rank, size, self.store.port, folder, function, args))
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def exit_codes(self, *, timeout: float = 240) -> list[int]:
        """Wait for all; negative: the signal that ended it. Raises TimeoutError, and nothing is left running."""
        deadline = time.monotonic() + timeout
        try:
            for process in self.processes:
                process.join(max(0.0, deadline - time.monotonic()))
            if any(process.exitcode is None for process in self.processes):
                raise TimeoutError(f"still running after {timeout} s\n{self.log()}")
            return [process.exitcode for process in self.processes]
        finally:
            for process in self.processes:
                _kill_group(process.pid)
                process.join()

    def results(self, *, timeout: float = 240) -> list[Any]:
        """What the function returned on each rank. Raises RuntimeError with the log when one failed."""
        codes = self.exit_codes(timeout=timeout)
        if any(codes):
            raise RuntimeError(f"exit codes {codes}\n{self.log()}")
        ranks = range(len(self.processes))
        files = [self.folder / f"result{rank}.pt" for rank in ranks]
        return [torch.load(file, map_location="cpu", weights_only=False) for file in files]

    def log(self) -> str:
        """The end of what each process printed."""
        return "\n".join(path.read_text()[-4000:] for path in sorted(self.folder.glob("rank*.log")))


def run_world(size: int, function: Callable[..., Any], *args: Any, folder: Path) -> list[Any]:
    """Results of `function(*args)` on `size` processes, by rank."""
    return World(size, function, *args, folder=folder).results()


def _work(rank: int, size: int, port: int, folder: Path, function: Callable[..., Any], args: Sequence[Any]) -> None:
    os.setsid()  # helpers that megatron starts are found, and ended, by this group
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True",
    )  # fmt: skip
    with (folder / f"rank{rank}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    try:
        torch.save(function(*args), folder / f"result{rank}.pt")
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        # Ranks that wait for this one in a collective would hang until the timeout.
        os._exit(1)


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def forward_pack(trainer: Trainer, tokens: TokenBatch, *, temperature: float) -> tuple[Tensor, Tensor]:
    """logprobs_R and entropy_R of one pack, with gradients."""
    seen = []

    def finish(_: int, shard: PackShard, hidden_rD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        seen.append(trainer.score(tokens, shard, hidden_rD, temperature=temperature))
        return hidden_rD.sum(), {}

    trainer.runner.run([tokens], finish, backward=False)
    return seen[0]
