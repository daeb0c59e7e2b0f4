"""The demo's data and model in one folder: data/ (videos, manifests) and model/ (a tiny random LongVILA)."""

from __future__ import annotations

import json
from pathlib import Path

from megalong.config.demo_data import DemoDataConfig
from megalong.config.errors import ConfigError
from megalong.data.demo_videos import make_demo_data
from megalong.data.sequence import THINKING_TEMPLATE
from megalong.models.longvila.demo_checkpoint import make_demo_checkpoint


def make_demo(config: DemoDataConfig) -> None:
    """`megalong make-demo-data`: write data/ and model/ below config.folder; the same seed gives the same files.

    Raises ConfigError when the folder cannot be made, or when files of another origin would be overwritten.
    """
    folder = Path(config.folder)
    _check_folder(folder)
    data = make_demo_data(folder / "data", config)
    lines = [json.loads(line) for line in data.train_sft.read_text().splitlines()]
    texts = [THINKING_TEMPLATE]
    for line in lines:
        texts += [line["problem"], f"<think>{line['reasoning']}</think>{line['answer']}"]
    make_demo_checkpoint(folder / "model", texts=texts, seed=config.seed)


def _check_folder(folder: Path) -> None:
    """A demo is made anew over an older one, and over nothing else."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"folder={folder} cannot be made: {error.strerror}; choose another folder") from error
    manifests = [folder / "data" / f"{split}.jsonl" for split in ("train_sft", "train_rl", "heldout")]
    there = [path for path in (*manifests, folder / "model" / "config.json") if path.exists()]
    first = manifests[0]  # the first file that a demo writes
    if there and not (first.is_file() and first.read_bytes().startswith(b'{"problem_id": "train_sft_00000_')):
        raise ConfigError(f"folder={folder}: {there[0]} is no demo's and would be overwritten; choose another folder")
