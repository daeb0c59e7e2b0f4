"""Whole GRPO steps of a random 7B LongVILA on hour-long 1080p videos: `megalong grpo` itself, files to new weights.

Only the weights are not read from files but made on the GPUs, nothing is saved, and a reward that random text can earn
is added (a share of letters), so that every step has advantages and changes the weights. Every step of a part has a
video of its own (with --videos as many as its steps), so that it is decoded, encoded, sampled and trained on.

The parts follow one another in the same processes, with the same weights, engine and GPUs; each is
FRAMES:STEPS[:a.b=c,..], with settings of its own: mr_sp.mode=none,model.recompute=full, or grpo.kl_coef=0 (no
reference pass), or rollout.steps_off_policy=1,grpo.tis_cap=2 (rollouts one step ahead, on GPUs of the engine's own).
What only the start of a run reads, the layout and the engine, is --overrides'. So are the weights of the reference
policy: the first part must have a KL term if any has, and peaks count them. The run's own metrics.jsonl is the result:
the phase table of each part (medians without its first step), and the gap between sampler's and trainer's
log-probabilities.

    torchrun --nproc-per-node 2 benchmarks/b12_grpo.py FOLDER [--parts 256:10 512:10 512:1:mr_sp.mode=none ..]
        [--overrides a.b=c ..]

--prepare --weights makes a folder that other commands take as well: `megalong check-sync FOLDER/recipe.yaml
model.path=FOLDER/model data.train=FOLDER/train.jsonl ..`, and `megalong cache-embeddings`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from b11_decode import write_clip, write_hour
from convert_7b import write_weights
from sessions import OUT_OF_MEMORY
from steps import fill_randomly, free, is_out_of_memory, make_folder, peak_gb, reset_peak

import megalong.grpo
import megalong.run
from megalong.config.load import load_config
from megalong.config.tree import SHARDED, ModelConfig, Recompute, RunConfig
from megalong.data.sequence import THINKING_TEMPLATE
from megalong.engine.build import build_model
from megalong.grpo import train_grpo
from megalong.metrics import SECONDS
from megalong.models.longvila.demo_checkpoint import DemoModelSize, train_tokenizer
from megalong.models.policy import PolicyModel
from megalong.parallel.layout import ParallelLayout, destroy_layout
from megalong.records import Sample
from megalong.rewards.functions import REWARDS
from megalong.run import PromptBatches, Run, open_run
from megalong.videos import vision_settings
from megalong.vision.encode import VisionStage

CLIP_SECONDS = 10
QUESTION = "What happens at the end?\nA. It rains.\nB. It snows.\nC. The sun shines.\nD. Nothing."
RECIPE = """
model: {path: none, dtype: bfloat16, recompute: keep_attention}
video: {cache_gib: 64, frame_cache_gib: 64}
grpo: {batch_size: 1}
rollout: {engine: vllm, group_size: 8}
reward: {weights: {accuracy: 0.0, format: 0.0, vowels: 1.0}}
checkpoint: {save_every: 0}
"""


CHANGES = ("mr_sp.mode", "model.recompute", "grpo.kl_coef", "grpo.tis_cap", "rollout.steps_off_policy")
"""What a part may change; of model.recompute keep_attention and full."""


def vowels(response: str, sample: Sample) -> float:
    """The share of vowels among the letters."""
    letters = [letter for letter in response.lower() if letter.isalpha()]
    return sum(letter in "aeiou" for letter in letters) / max(1, len(letters))


def build_random(config: ModelConfig, layout: ParallelLayout, *, sequence_parallel: bool) -> PolicyModel:
    """build_model with weights that are not read."""
    model = build_model(config, layout, sequence_parallel=sequence_parallel, load=False)
    fill_randomly(model, layout)
    return model


@dataclass(frozen=True, kw_only=True)
class Part:
    """Steps of one kind."""

    frames: int
    steps: int
    overrides: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> Part:
        frames, steps, *rest = text.split(":", 2)
        overrides = tuple(rest[0].split(",")) if rest else ()
        for override in overrides:
            if override.split("=")[0] not in CHANGES or override == "model.recompute=none":
                raise argparse.ArgumentTypeError(f"{text}: a part may change {', '.join(CHANGES)}, not {override!r}")
        return cls(frames=int(frames), steps=int(steps), overrides=overrides)

    @property
    def name(self) -> str:
        return ", ".join([f"{self.frames} frames", *self.overrides])


class Session(Run):
    """A run that one call of train_grpo hands on to the next, with other frames and another mode; nothing is saved."""

    def change(self, config: RunConfig) -> None:
        trainer, old = self.trainer, self.vision
        self.config = config
        self.vision = VisionStage(trainer.model.vision, self.layout, vision_settings(config), videos=old.videos)
        sharded = config.mr_sp.mode.name in SHARDED
        trainer.runner = replace(trainer.runner, sharded=sharded, embeddings=self.vision.embeddings)
        trainer.keep_attention = config.model.recompute is Recompute.keep_attention
        old.close()
        free(self.layout.device)

    def save(self, batches: PromptBatches) -> Path:
        return Path()

    def close(self) -> None:
        """At the very end: finish()."""

    def finish(self) -> None:
        super().close()


def prepare(folder: Path, *, videos: int, tiny: bool) -> None:
    """Model folder without weights, videos, manifest; `ready` at the end. Keeps what an earlier call made."""
    if (folder / "ready").is_file():
        return
    make_folder(folder, layers=2 if tiny else 28, tiny=tiny)
    train_tokenizer([THINKING_TEMPLATE, QUESTION], size=DemoModelSize(vocab=320)).save_pretrained(
        folder / "model" / "llm"
    )
    (folder / "recipe.yaml").write_text(RECIPE)

    def write(number: int) -> dict[str, str]:
        clip, name = folder / f"clip{number}.mp4", f"hour{number}.mp4"
        size = {"width": 192, "height": 112} if tiny else {}
        write_clip(clip, gop=250, crf=32, frames=CLIP_SECONDS * 30, seed=number, **size)
        write_hour(clip, folder / name, clip_seconds=CLIP_SECONDS)
        return {
            "id": str(number), "problem": QUESTION, "answer": "A", "videos": name, "problem_type": "multiple choice"
        }  # fmt: skip

    with ThreadPoolExecutor() as pool:
        rows = list(pool.map(write, range(videos)))
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "ready").touch()


def table(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the steps of a part but the first, which waits for the first decoding."""
    timed = rows[1:] or rows
    measured = dict.fromkeys(name for row in timed for name in row)  # a step whose samples were all dropped has fewer
    names = [name for name in measured if name.startswith((SECONDS, "sampler_gap", "policy_lag", "tis_weight"))]
    names += [name for name in ("reward", "grad_norm", "response_tokens", "tokens_per_second") if name in measured]
    medians = {name: statistics.median(row[name] for row in timed if name in row) for name in names}
    whole = [sum(value for name, value in row.items() if name.startswith(SECONDS)) for row in timed]
    worst = max(row["sampler_gap_sum"] for row in rows if "sampler_gap_sum" in row)
    return {
        "step": statistics.median(whole), "fastest": min(whole), "slowest": max(whole), **medians, "gap_worst": worst
    }  # fmt: skip


def config_of(folder: Path, part: Part, *, args: argparse.Namespace, before: int) -> RunConfig:
    frames = max(other.frames for other in args.parts)  # what the engine has room for
    return load_config(
        folder / "recipe.yaml",
        [
            f"model.path={folder / 'model'}", f"data.train={folder / 'train.jsonl'}",
            f"logger.run_dir={folder / args.label}",
            f"video.num_frames={part.frames}", f"data.max_prompt_tokens={257 * frames + 512}",
            f"data.max_response_tokens={args.length}", f"grpo.steps={before + part.steps}",
            f"data.pack_tokens={257 * part.frames + 512 + 8 * args.length}",
            *args.overrides, *part.overrides,
        ],
    )  # fmt: skip


def run_parts(folder: Path, args: argparse.Namespace) -> None:
    """Report a row of each part; what a part that does not fit leaves is an `out of memory` row, and the end."""
    session: Session | None = None
    file, before = folder / args.label / "metrics.jsonl", 0

    def open_session(config: RunConfig, **options: Any) -> Run:
        nonlocal session
        if session is None:
            opened = open_run(config, **options)
            session = Session(**{item.name: getattr(opened, item.name) for item in fields(opened)})
        session.change(config)
        return session

    megalong.run.build_model, megalong.grpo.open_run = build_random, open_session
    for part in args.parts:
        try:
            train_grpo(config_of(folder, part, args=args, before=before))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            report({"part": part.name, "status": "out of memory"}, args.json)
            # The other ranks may wait for this one in a collective.
            os._exit(OUT_OF_MEMORY)
        steps = [json.loads(line) for line in file.read_text().splitlines()] if session.layout.is_main else []
        steps = [row for row in steps if "loss" in row][before:]
        before += part.steps
        if session.layout.is_main:
            peak = peak_gb(session.layout.device)
            report({"part": part.name, "steps": len(steps), **table(steps), "peak_gb": peak}, args.json)
        reset_peak(session.layout.device)
    session.finish()


def report(row: dict[str, Any], file: Path | None) -> None:
    """Print a part's row and add it to the file as a line, which any rank may do that runs out of memory: once."""
    for name, value in row.items():
        print(f"{name:32} {value:.4g}" if isinstance(value, float) else f"{name:32} {value}", flush=True)
    line = json.dumps(row)
    if file and line not in (file.read_text().splitlines() if file.is_file() else []):
        with file.open("a") as lines:
            lines.write(line + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of model, videos and runs; what is there is used again")
    parser.add_argument("--parts", type=Part.of, nargs="+", default=[Part.of("256:10")])
    parser.add_argument("--length", type=int, default=512, help="tokens of a response")
    parser.add_argument("--videos", type=int, default=10)
    parser.add_argument("--label", default="run", help="name of the run's folder in FOLDER")
    parser.add_argument("--prepare", action="store_true", help="make the folder, and no more")
    parser.add_argument(
        "--weights", action="store_true", help="in the folder, too (15 GB): for other commands, which read them"
    )
    parser.add_argument("--json", type=Path, help="file for the rows, a line each")
    parser.add_argument("--overrides", nargs="*", default=[], metavar="a.b=c")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO)
    if int(os.environ.get("RANK", "0")) == 0:
        prepare(args.folder, videos=args.videos, tiny=args.tiny)
        if args.weights and not [*(args.folder / "model").rglob("*.safetensors")]:
            write_weights(args.folder / "model")
        if args.json:
            args.json.unlink(missing_ok=True)
    while not (args.folder / "ready").is_file():
        time.sleep(0.2)
    if args.prepare:
        return
    REWARDS["vowels"] = vowels
    run_parts(args.folder, args)
    destroy_layout()


if __name__ == "__main__":
    main()
