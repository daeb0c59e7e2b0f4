"""The command line: `megalong VERB ...`. Heavy imports happen inside the verbs, so `--help` and `plan` are quick."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

RECIPE_VERBS = {
    "sft": "chain-of-thought supervised fine-tuning",
    "grpo": "group-relative policy optimisation on video questions",
    "eval": "accuracy on a manifest (eval.manifest)",
    "check-sync": "compare weights and log-probabilities of the trainer and its rollout engine",
    "cache-embeddings": "decode and encode the videos of data.train and eval.manifest into video.cache_dir",
    "make-demo-data": "draw the demo's videos and manifests and make its tiny model",
    "plan": "print the resolved config, layout, tokens per prompt and memory per GPU; needs no GPU",
}

PLANNED = ("sft", "grpo", "eval", "check-sync", "cache-embeddings")
"""Verbs that plan works out."""

FAILURES = ("RunFailedError", "TooManySkippedStepsError")
"""Errors of the machine and of the processes beside this one, or of the steps, by name as in _is."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megalong", description="Reinforcement learning on hour-long video.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name, text in RECIPE_VERBS.items():
        verb = verbs.add_parser(name, help=text, description=text)
        demo = name == "make-demo-data"
        example = "demo_data.yaml" if demo else "grpo_7b_512f.yaml"
        verb.add_argument("recipe", type=Path, help=f"YAML recipe, for example launch/recipes/{example}")
        example = "seed=2 questions.train_rl=100" if demo else "grpo.steps=200 parallel.tp=4"
        verb.add_argument("overrides", nargs="*", help=f"a.b=c, for example {example}")
        if name == "plan":
            verb.add_argument("--task", choices=PLANNED, default="grpo", help="verb to plan for (default: grpo)")
    report = verbs.add_parser("report", help="summary.json, table and picture of a demo folder")
    report.add_argument("folder", type=Path, help="what launch/demo.sh filled, for example runs/demo")
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Arguments in any order: argparse alone takes no overrides behind an option."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    rest = [text for text in rest if text != "--"]
    if rest and ("overrides" not in args or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


def main(argv: list[str] | None = None) -> int:
    """Run one verb.

    What the user gave (config, manifest, checkpoint) ends it with one message and exit code 2, the machine (memory,
    other ranks, the rollout engine) or a check that fails with one message and 1, a stuck phase with its stacks and 3;
    any other error keeps its traceback.
    """
    args = parse(argv)
    # megatron-core says once per module that it falls back to torch's own kernels, as meant on a CPU.
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*not installed", category=UserWarning)
    # Of its own calls, which no setting of a run changes.
    warnings.filterwarnings("ignore", message="full scope is deprecated", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(megatron\.core|torch\.distributed)\.")
    try:
        if args.verb in RECIPE_VERBS:
            return _run_recipe(args)
        from megalong.report import summary_table, write_summary

        print(summary_table(write_summary(args.folder)))  # noqa: T201
    except Exception as error:
        if not _is_complete(error):
            raise
        print(f"megalong {args.verb}: {error}", file=sys.stderr)  # noqa: T201
        if _is(error, "ConfigError"):
            _tell_torchrun(error)
        return 1 if _is(error, *FAILURES) else 2
    return 0


def _tell_torchrun(error: Exception) -> None:
    """A recipe that cannot be read is in torchrun's summary, too, as are the errors behind it."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file and not Path(file).exists():
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error.with_traceback(None))


def _is_complete(error: Exception) -> bool:
    """Errors whose message says what to change; all others keep their traceback."""
    given = ("ConfigError", "ManifestError", "CheckpointError", "FileNotFoundError")
    others = ("EmbeddingCacheError", "StoreFullError", "ReportError")
    return _is(error, *given, *others, *FAILURES)


def _is(error: Exception, *names: str) -> bool:
    """By name, because the modules that define them are heavy."""
    return any(kind.__name__ in names for kind in type(error).__mro__)


def _run_recipe(args: argparse.Namespace) -> int:
    if args.verb == "make-demo-data":
        from megalong.config.demo_data import load_demo_data

        config = load_demo_data(args.recipe, args.overrides)
        from megalong.demo import make_demo

        make_demo(config)
        return 0
    from megalong.config.load import load_config

    config = load_config(args.recipe, args.overrides)
    if args.verb == "plan":
        from megalong.config.plan import check_engine, plan, planned_processes, shape_for_planning
        from megalong.config.plan_text import render
        from megalong.config.validate import validate
        from megalong.rewards.functions import check_weights

        shape, note = shape_for_planning(config)
        validate(config, task=args.task, world_size=planned_processes(config), model=shape)
        check_engine(config, args.task, shape)
        if args.task == "grpo":
            check_weights(config.reward.weights)  # their names are known above the configuration's layer
        print(render(plan(config, args.task, shape, note=note)))  # noqa: T201
        return 0
    import torch

    from megalong.cache_embeddings import cache_embeddings
    from megalong.checking import check_sync
    from megalong.config.validate import TRAINING
    from megalong.evaluating import evaluate
    from megalong.failures import failures_reported
    from megalong.grpo import train_grpo
    from megalong.metrics import PhaseTimer, notices_shown
    from megalong.sft import train_sft

    timer = PhaseTimer(torch.cuda.synchronize if torch.cuda.is_available() else None)
    verbs = {
        "sft": train_sft,
        "grpo": train_grpo,
        "eval": evaluate,
        "check-sync": check_sync,
        "cache-embeddings": cache_embeddings,
    }
    is_main = os.environ.get("RANK", "0") == "0"
    with notices_shown(is_main=is_main), failures_reported(config, timer, trains=args.verb in TRAINING):
        verbs[args.verb](config, timer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
