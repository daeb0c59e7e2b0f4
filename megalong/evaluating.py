"""Evaluation: the policy answers a manifest's questions, greedily or with n samples each."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from megalong.config.load import with_run_dir
from megalong.config.tree import RunConfig
from megalong.data.manifest import ManifestError
from megalong.data.packing import GroupTokens, pack_groups, plan_packs
from megalong.data.sequence import continued
from megalong.engine.checkpoint import newest_checkpoint, step_of
from megalong.evaluate.score import EvalReport, choices_of, evaluate_responses, score_response
from megalong.failures import RunFailedError
from megalong.metrics import DROPPED_FILE, EVALUATIONS_FILE, PhaseTimer, read_jsonl
from megalong.parallel.collectives import broadcast_object, gather_objects
from megalong.parallel.split import shard_range
from megalong.records import Dropped, RolloutGroup, Sample
from megalong.rollout.engine import Sampling
from megalong.run import Run, checked_shape, make_ready, open_run, owned_embeddings, plan_prompts, read_samples


@dataclass(kw_only=True, slots=True)
class Answers:
    """Of the questions of all replicas, by sample id."""

    texts: dict[str, tuple[str, ...]]
    chosen: dict[str, tuple[str, ...]]  # most_likely_options, with eval.likelihood
    dropped: list[Dropped]  # questions that no response was made for


def evaluate(config: RunConfig, timer: PhaseTimer | None = None) -> EvalReport:
    """`megalong eval`: score the weights of model.path (or model.init_from) on eval.manifest.

    The report names them, and has the step of a training run's checkpoint. Everything is written to
    <logger.run_dir>/eval/<name of the manifest>: the folder may be a training run's. Raises ManifestError when
    no question's videos can be read, RunFailedError at SIGTERM; there is no report then.
    """
    checked_shape(config, task="eval")
    samples = eval_samples(config)
    run_dir = Path(config.logger.run_dir) / "eval" / Path(str(config.eval.manifest)).stem
    checkpoint = newest_checkpoint(Path(config.model.init_from)) if config.model.init_from else None
    weights = f"model.init_from={checkpoint}" if checkpoint else f"model.path={config.model.path}"
    step = step_of(checkpoint) if checkpoint else 0
    # The checkpoint itself: a training run may save another one meanwhile.
    config = with_run_dir(config, run_dir, init_from=str(checkpoint) if checkpoint else None)
    with open_run(config, task="eval", timer=timer or PhaseTimer()) as run:
        answers = answer(run, samples, name="eval", step=step)
        if answers and answers.texts:
            return report_answers(run, samples, answers, name="eval", step=step, weights=weights)
    if answers is None:
        raise RunFailedError("ended by SIGTERM before all questions were answered: there is no report; start it again")
    raise ManifestError(_unread(config, samples, answers))


def eval_samples(config: RunConfig) -> list[Sample]:
    """Questions of eval.manifest, those about the same video next to each other so that it is encoded once."""
    samples = read_samples(
        config, manifest=str(config.eval.manifest), video_dir=config.eval.video_dir, thinking_targets=False
    )
    return sorted(samples, key=lambda sample: sample.videos)


def evaluate_policy(run: Run, samples: Sequence[Sample], *, name: str, step: int) -> EvalReport | None:
    """Answer, score and write <name>.json and <name>_responses.jsonl into the run folder. Equal on all ranks.

    None, and nothing is written, when any process got SIGTERM before all questions were answered.
    """
    answers = answer(run, samples, name=name, step=step)
    if answers is None:
        if run.layout.is_main:
            tqdm.write(f"{name}: left at SIGTERM, without a report")
        return None
    weights = f"this run's weights after {step} steps"
    return report_answers(run, samples, answers, name=name, step=step, weights=weights)


@torch.no_grad()
def answer(run: Run, samples: Sequence[Sample], *, name: str, step: int) -> Answers | None:
    """Every replica answers a share of the questions; what cannot be read is written to dropped.jsonl (collective).

    None at SIGTERM. All replicas meet before each batch, those that are done too: none waits for another for longer
    than a batch takes, and all hear of a SIGTERM.
    """
    settings, layout = run.config.eval, run.layout
    with run.timer.during("rollout"):
        run.sampler.settle()
    first, last = shard_range(len(samples), layout.dp_rank, layout.dp_size)
    mine = samples[first:last]
    sampling = Sampling(
        group_size=settings.num_samples,
        max_tokens=run.config.data.max_response_tokens,
        temperature=settings.temperature,
        top_p=run.config.rollout.top_p,
        top_k=run.config.rollout.top_k,
    )
    done = Answers(texts={}, chosen={}, dropped=[])
    largest_share = -(-len(samples) // layout.dp_size)
    bar = tqdm(total=len(mine), desc=name, disable=not layout.is_main, unit="question", leave=False)
    with bar, run.heeding_sigterm(), run.sampler.uncounted():
        for at in range(0, largest_share, settings.batch_prompts):
            if run.stop_anywhere():
                return None
            if batch := mine[at : at + settings.batch_prompts]:
                with run.timer.during("eval"):
                    _answer_batch(run, batch, sampling, step=step, done=done)
                bar.update(len(batch))
    everyone = Answers(texts={}, chosen={}, dropped=[])
    for part in gather_objects(done, group=layout.dp):
        everyone.texts.update(part.texts)
        everyone.chosen.update(part.chosen)
        everyone.dropped += part.dropped
    run.logger.dropped(everyone.dropped, step)
    run.report_decoded_elsewhere(step)
    return everyone


def _answer_batch(run: Run, batch: Sequence[Sample], sampling: Sampling, *, step: int, done: Answers) -> None:
    """Questions of this replica, added to `done`."""
    run.release_videos()
    prompts, unusable = plan_prompts(run, batch)
    prompts, unreadable = make_ready(run, prompts)
    embeds = owned_embeddings(run, prompts)
    run.sync_weights()  # not before: an engine on the trainer's GPUs may sleep but for sampling
    groups = run.sampler.finish(run.sampler.begin(prompts, embeds, sampling=sampling, step=step))
    run.sampler.release()
    if run.config.eval.likelihood:
        done.chosen.update(most_likely_options(run, groups))
    done.texts.update({group.prompt.sample.sample_id: group.texts for group in groups})
    done.dropped += [*unusable, *unreadable]


def report_answers(
    run: Run, samples: Sequence[Sample], answers: Answers, *, name: str, step: int, weights: str
) -> EvalReport:
    """Score and write them. weights: whose answers they are.

    A question without a response counts as answered wrongly, as an empty response: accuracy is over the whole manifest.
    """
    config, is_main = run.config, run.layout.is_main
    nothing = ("",) * config.eval.num_samples
    items = [(sample, answers.texts.get(sample.sample_id, nothing)) for sample in samples]
    thinking = config.data.thinking
    report = evaluate_responses(
        items,
        chosen=answers.chosen if config.eval.likelihood else None,
        thinking=thinking,
        unread=len(samples) - len(answers.texts),
        weights=weights,
    )
    if is_main:
        _write(Path(config.logger.run_dir), name, report, items, answers.chosen, thinking=thinking)
        tqdm.write(f"{name}: {weights}, written to {config.logger.run_dir}\n{report.to_table()}")
    if is_main and report.unread:
        tqdm.write(f"{name}: {_unread(config, samples, answers)}")
    metrics = {"strict": report.overall.strict, "tolerant": report.overall.tolerant, "unread": float(report.unread)}
    if report.overall.likelihood:
        metrics["likelihood"] = report.overall.likelihood.accuracy
    run.logger.log_evaluation(step, metrics)
    return report


def _unread(config: RunConfig, samples: Sequence[Sample], answers: Answers) -> str:
    """The message about questions that no response was made for."""
    num, read, first = len(samples), len(answers.texts), answers.dropped[0]
    count = f"{num - read} of {num} questions have no" if read else f"NONE of {num} questions has a"
    folder = config.eval.video_dir or f"null, the folder of {config.eval.manifest}"
    return (
        f"{count} response; the first: {first.sample_id}: {first.reason}. All are in "
        f"{config.logger.run_dir}/{DROPPED_FILE}; relative video paths start from eval.video_dir={folder}"
    )


def most_likely_options(run: Run, groups: Sequence[RolloutGroup]) -> dict[str, tuple[str, ...]]:
    """Sample id of each multiple-choice question -> per response, the letter that the model would most likely answer.

    The letters are compared behind the response's own reasoning, as `X</answer>` and the end token: all of them may
    follow the same tokens, and the log-probability of what differs decides.
    """
    asked: list[tuple[str, str]] = []  # sample id and letters of each of `options`
    options: list[GroupTokens] = []
    for group in groups:
        letters = choices_of(group.prompt.sample)
        for text in group.texts if letters else ():
            answers = [run.builder.answered(text, letter) for letter in letters]
            shared = len(os.path.commonprefix(answers))
            prompt = continued(group.prompt, answers[0][:shared])
            options.append(GroupTokens(prompt=prompt, responses=tuple(answer[shared:] for answer in answers)))
            asked.append((group.prompt.sample.sample_id, letters))
    plan = plan_packs(options, pack_tokens=run.config.data.pack_tokens)
    packs = [pack_groups([options[index] for index in pack]) for pack in plan]
    sums: list[float] = []  # of each letter of each option list
    for tokens, logprobs_R in zip(packs, run.trainer.logprobs(packs, temperature=1.0) if packs else [], strict=True):
        sums += [part.sum().item() for part in logprobs_R.double().split(tokens.response_lens)]
    chosen: dict[str, tuple[str, ...]] = {}
    for sample_id, letters in asked:
        scores, sums = sums[: len(letters)], sums[len(letters) :]
        chosen[sample_id] = (*chosen.get(sample_id, ()), letters[scores.index(max(scores))])
    return chosen


def _write(
    folder: Path, name: str, report: EvalReport, items: Sequence[tuple[Sample, Sequence[str]]],
    chosen: Mapping[str, Sequence[str]], *, thinking: bool,
) -> None:  # fmt: skip
    (folder / f"{name}.json").write_text(report.to_json())
    with (folder / f"{name}_responses.jsonl").open("w") as file:
        for sample, responses in items:
            scores = [score_response(response, sample, thinking=thinking) for response in responses]
            row = {
                "sample_id": sample.sample_id,
                "category": sample.category,
                "question": sample.question,
                "answer": sample.answer,
                "responses": list(responses),
                "strict": [score.strict for score in scores],
                "tolerant": [score.tolerant for score in scores],
            }
            if sample.sample_id in chosen:
                row["most_likely_option"] = list(chosen[sample.sample_id])
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def evaluate_before_loop(run: Run, samples: Sequence[Sample], *, total: int, round_steps: int = 1) -> None:
    """At step 0, or of a run that goes on the evaluation of its checkpoint's step, where it was ended in that one.

    round_steps: optimizer steps in a round of the loop. The evaluation after the last step is left to the loop's end.
    """
    step = run.trainer.step
    if step < total:
        run.step_before = step - round_steps  # as it was when the checkpoint was saved
        evaluate_if_due(run, samples, step=step, total=total)


def evaluate_if_due(run: Run, samples: Sequence[Sample], *, step: int, total: int) -> None:
    """eval.at_start before the first step, eval.every between, eval.at_end after the last; none a second time."""
    settings = run.config.eval
    if step == 0:
        due, name = settings.at_start, "eval_start"
    elif step == total:
        due, name = settings.at_end, "eval_end"
    else:
        due, name = step < total and run.is_due(settings.every), f"eval_{step:06d}"
    if due and not is_evaluated(run, step=step):
        evaluate_policy(run, samples, name=name, step=step)


def is_evaluated(run: Run, *, step: int) -> bool:
    """Whether evaluations.jsonl has a row of the step; the main process looks (collective)."""
    path, layout = Path(run.config.logger.run_dir) / EVALUATIONS_FILE, run.layout
    found = layout.is_main and path.exists() and any(row["step"] == step for row in read_jsonl(path))
    return broadcast_object(found, source=0, group=layout.world)
