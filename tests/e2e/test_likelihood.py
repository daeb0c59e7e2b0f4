"""eval.likelihood: the option chosen is the one that transformers finds the most likely, on any layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from harness import DemoWorld, run_world
from torch import Tensor

from megalong.config.tree import RunConfig
from megalong.evaluate.score import choices_of
from megalong.evaluating import eval_samples, evaluate_policy
from megalong.metrics import PhaseTimer
from megalong.records import MEDIA_TOKEN
from megalong.run import Run, make_ready, open_run, plan_prompts

LAYOUTS = {
    "tp2": ["parallel.tp=2"], "dp2": [], "cp2": ["parallel.cp=2"], "pp2": ["parallel.pp=2"],
    "cp2_none": ["parallel.cp=2", "mr_sp.mode=none"], "cp2_stage1": ["parallel.cp=2", "mr_sp.mode=stage1"],
}  # fmt: skip


def evaluated(config: RunConfig, with_oracle: bool) -> dict[str, list[str]]:
    """Sample id -> what transformers finds the most likely behind the responses that were written; {} without."""
    samples = eval_samples(config)
    run = open_run(config, task="eval", timer=PhaseTimer())
    evaluate_policy(run, samples, name="eval", step=0)
    found = {}
    if with_oracle:
        prompts, _ = plan_prompts(run, samples)
        prompts, _ = make_ready(run, prompts)
        embeds = run.vision.embeddings_of(prompts, [0] * len(prompts))
        responses = {row["sample_id"]: row["responses"] for row in read_rows(Path(config.logger.run_dir))}
        for prompt, embeds_ND in zip(prompts, embeds, strict=True):
            letters = choices_of(prompt.sample)
            if letters:
                found[prompt.sample.sample_id] = [
                    max(letters, key=lambda letter: log_likelihood(run, prompt.ids_P, embeds_ND, text, letter))  # noqa: B023
                    for text in responses[prompt.sample.sample_id]
                ]
    run.close()
    return found


@torch.no_grad()
def log_likelihood(run: Run, ids_P: tuple[int, ...], embeds_ND: Tensor, text: str, letter: str) -> float:
    """Of the whole response with this letter as its answer: one plain sequence through transformers' model."""
    model, response = run.sampler.engine.model, run.builder.answered(text, letter)
    ids_T = torch.tensor([*ids_P, *response])
    embeds_TD = model.get_input_embeddings()(ids_T.clamp_min(0))
    embeds_TD[ids_T == MEDIA_TOKEN] = embeds_ND
    logprobs_TV = model(inputs_embeds=embeds_TD[None]).logits[0].double().log_softmax(-1)
    rows = logprobs_TV[len(ids_P) - 1 : -1]
    return rows.gather(1, torch.tensor(response)[:, None]).sum().item()


def read_rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "eval_responses.jsonl").read_text().splitlines()]


def config_of(demo: DemoWorld, run_dir: Path, *overrides: str) -> RunConfig:
    settings = ["eval.likelihood=true", "eval.num_samples=3", "eval.temperature=1.0", "data.pack_tokens=700"]
    return demo.config(run_dir, f"eval.manifest={demo.rl}", *settings, *overrides, task="grpo")


@pytest.fixture(scope="module")
def alone(demo: DemoWorld, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[str]]]:
    """The run folder of one process, and what transformers says."""
    folder = tmp_path_factory.mktemp("alone")
    (found,) = run_world(1, evaluated, config_of(demo, folder / "run"), True, folder=folder)
    return folder / "run", found


def test_the_chosen_option_is_transformers_most_likely_one(alone: tuple[Path, dict[str, list[str]]]) -> None:
    run_dir, want = alone
    rows = read_rows(run_dir)
    assert {row["sample_id"]: row["most_likely_option"] for row in rows if "most_likely_option" in row} == want
    assert len(want) >= 4
    assert len({tuple(letters) for letters in want.values()}) > 1
    assert len(want) < len(rows), "questions without options have no likelihood"
    truths = {row["sample_id"]: row["answer"] for row in rows}
    right = [letter == truths[name] for name, letters in want.items() for letter in letters]
    report = json.loads((run_dir / "eval.json").read_text())["overall"]["likelihood"]
    assert report == {"num_questions": len(want), "accuracy": pytest.approx(sum(right) / len(right)), "chance": 0.25}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_chooses_alike(
    demo: DemoWorld, alone: tuple[Path, dict[str, list[str]]], tmp_path: Path, name: str
) -> None:
    run_world(2, evaluated, config_of(demo, tmp_path / "run", *LAYOUTS[name]), False, folder=tmp_path / "world")
    assert (tmp_path / "run" / "eval_responses.jsonl").read_text() == (alone[0] / "eval_responses.jsonl").read_text()
