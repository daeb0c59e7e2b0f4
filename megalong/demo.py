"""The demo's data and model in one folder: data/ (videos, manifests) and model/ (a tiny random LongVILA)."""

from __future__ import annotations

import json
from pathlib import Path

from megalong.config.demo_data import DemoDataConfig
from megalong.data.demo_videos import make_demo_data
from megalong.data.sequence import THINKING_TEMPLATE
from megalong.models.longvila.demo_checkpoint import make_demo_checkpoint


def make_demo(config: DemoDataConfig) -> None:
    """`megalong make-demo-data`: write data/ and model/ below config.folder; the same seed gives the same files."""
    folder = Path(config.folder)
    data = make_demo_data(folder / "data", config)
    lines = [json.loads(line) for line in data.train_sft.read_text().splitlines()]
    texts = [THINKING_TEMPLATE]
    for line in lines:
        texts += [line["problem"], f"<think>{line['reasoning']}</think>{line['answer']}"]
    make_demo_checkpoint(folder / "model", texts=texts, seed=config.seed)
