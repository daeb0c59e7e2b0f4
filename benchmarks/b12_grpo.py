"""Whole GRPO steps of a random 7B LongVILA on hour-long 1080p videos: `megalong grpo` itself, files to new weights.

Only the weights are not read from files but made on the GPUs, and a reward that random text can earn is added (a share
of letters), so that every step has advantages and changes the weights. The run's own metrics.jsonl is the result: the
phase table, and the gap between sampler's and trainer's log-probabilities.

    torchrun --nproc-per-node 2 benchmarks/b12_grpo.py FOLDER [--frames 256] [--steps 10] [--overrides a.b=c ..]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from b11_decode import write_clip, write_hour
from steps import fill_randomly, make_folder

import megalong.run
from megalong.config.load import load_config
from megalong.config.tree import ModelConfig
from megalong.data.sequence import THINKING_TEMPLATE
from megalong.engine.build import build_model
from megalong.grpo import train_grpo
from megalong.models.longvila.demo_checkpoint import DemoModelSize, train_tokenizer
from megalong.models.policy import PolicyModel
from megalong.parallel.layout import ParallelLayout, destroy_layout
from megalong.records import Sample
from megalong.rewards.functions import REWARDS

CLIP_SECONDS = 10
QUESTION = "What happens at the end?\nA. It rains.\nB. It snows.\nC. The sun shines.\nD. Nothing."
RECIPE = """
model: {path: none, dtype: bfloat16}
video: {cache_gib: 64, frame_cache_gib: 64}
grpo: {batch_size: 1}
rollout: {engine: vllm, group_size: 8}
reward: {weights: {accuracy: 0.0, format: 0.0, vowels: 1.0}}
checkpoint: {save_every: 0}
"""


def vowels(response: str, sample: Sample) -> float:
    """The share of vowels among the letters."""
    letters = [letter for letter in response.lower() if letter.isalpha()]
    return sum(letter in "aeiou" for letter in letters) / max(1, len(letters))


def build_random(config: ModelConfig, layout: ParallelLayout, *, sequence_parallel: bool) -> PolicyModel:
    """build_model with weights that are not read."""
    model = build_model(config, layout, sequence_parallel=sequence_parallel, load=False)
    fill_randomly(model, layout)
    return model


def prepare(folder: Path, *, videos: int, tiny: bool) -> None:
    """Model folder without weights, videos, manifest; `ready` at the end."""
    make_folder(folder, layers=2 if tiny else 28, tiny=tiny)
    train_tokenizer([THINKING_TEMPLATE, QUESTION], size=DemoModelSize(vocab=320)).save_pretrained(
        folder / "model" / "llm"
    )
    (folder / "recipe.yaml").write_text(RECIPE)
    rows = []
    for number in range(videos):
        clip, name = folder / f"clip{number}.mp4", f"hour{number}.mp4"
        size = {"width": 192, "height": 112} if tiny else {}
        write_clip(clip, gop=250, crf=32, frames=CLIP_SECONDS * 30, seed=number, **size)
        write_hour(clip, folder / name, clip_seconds=CLIP_SECONDS)
        rows.append(
            {"id": str(number), "problem": QUESTION, "answer": "A", "videos": name, "problem_type": "multiple choice"}
        )
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "ready").touch()


def table(file: Path, *, skip: int) -> dict[str, Any]:
    """Medians over the steps but the first `skip`: what they warm up."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    names = [name for name in steps[-1] if name.startswith("seconds") or name.startswith("sampler_gap")]
    names += ["reward", "grad_norm", "response_tokens", "tokens_per_second"]
    medians = {name: statistics.median(row[name] for row in steps[skip:] if name in row) for name in names}
    return {"steps": len(steps), **medians, "gap_worst": max(row["sampler_gap_sum"] for row in steps)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="made anew")
    parser.add_argument("--frames", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--length", type=int, default=512, help="tokens of a response")
    parser.add_argument("--videos", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--overrides", nargs="*", default=[], metavar="a.b=c")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args(argv)
    folder, is_main = args.folder, int(os.environ.get("RANK", "0")) == 0
    started = time.perf_counter()
    if is_main:
        prepare(folder, videos=args.videos, tiny=args.tiny)
        print(f"videos and model folder: {time.perf_counter() - started:.0f} s", flush=True)
    while not (folder / "ready").is_file():
        time.sleep(0.2)
    megalong.run.build_model = build_random
    REWARDS["vowels"] = vowels
    config = load_config(
        folder / "recipe.yaml",
        [
            f"model.path={folder / 'model'}", f"data.train={folder / 'train.jsonl'}",
            f"logger.run_dir={folder / 'run'}",
            f"video.num_frames={args.frames}", f"data.max_prompt_tokens={257 * args.frames + 512}",
            f"data.max_response_tokens={args.length}", f"grpo.steps={args.steps}", "data.pack_tokens=200000",
            *args.overrides,
        ],
    )  # fmt: skip
    train_grpo(config)
    if is_main:
        row = {"frames": args.frames, **table(folder / "run" / "metrics.jsonl", skip=min(2, args.steps - 1))}
        for name, value in row.items():
            print(f"{name:24} {value:.4g}" if isinstance(value, float) else f"{name:24} {value}")
        if args.json:
            args.json.write_text(json.dumps(row, indent=1))
    destroy_layout()


if __name__ == "__main__":
    main()
