"""`megalong-convert VERB ...`: exit code 0 when done or equal, 1 when different, 2 for an error."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from checkpoints_tools.signals import handled_by

DTYPES = ("bf16", "float32", "keep")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megalong-convert", description="Convert, verify and inspect checkpoints, one tensor at a time."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    to_megatron = verbs.add_parser("hf-to-megatron", help="Hugging Face folder to Megatron checkpoint")
    to_megatron.add_argument("--hf", type=Path, required=True, help="folder in the family's layout")
    to_megatron.add_argument(
        "--tp", type=int, default=1, help="check that the model can be cut over N ranks (default: 1)"
    )
    to_megatron.add_argument("--pp", type=int, default=1, help="check that it can be cut into N stages (default: 1)")
    to_hf = verbs.add_parser("megatron-to-hf", help="Megatron checkpoint to Hugging Face folder")
    to_hf.add_argument(
        "--megatron", type=Path, required=True, help="checkpoint, or folder of step_<n> checkpoints (newest is taken)"
    )
    to_hf.add_argument(
        "--like", type=Path, required=True, help="folder that gives names, files and all that the checkpoint lacks"
    )
    to_hf.add_argument("--shard-gb", type=float, help="cut weight files anew at this size (default: as in --like)")
    for verb in (to_megatron, to_hf):
        verb.add_argument("--out", type=Path, required=True, help="new folder; appears when it is complete")
        verb.add_argument("--dry-run", action="store_true", help="check everything, write nothing")
    compare = verbs.add_parser("verify", help="compare two checkpoints bit by bit; exit code 0 equal, 1 different")
    for name in ("a", "b"):
        compare.add_argument(name, type=Path, help="Hugging Face folder, or Megatron checkpoint (or folder of them)")
    compare.add_argument("--like", type=Path, help="Hugging Face folder with the sizes of two Megatron checkpoints")
    for verb in (to_megatron, to_hf, compare):
        verb.add_argument("--dtype", choices=DTYPES, default="keep", help="cast the model's tensors (default: keep)")
    inspect = verbs.add_parser("inspect", help="family, sizes, tensors, dtypes, parameters, checksum")
    inspect.add_argument("folder", type=Path, help="as those of verify")
    inspect.add_argument("--no-checksum", action="store_true", help="read headers only")
    for verb in (to_megatron, to_hf, compare, inspect):
        verb.add_argument(
            "--allow-pickle",
            action="store_true",
            help="read pytorch_model*.bin where a Hugging Face folder has no safetensors; only tensors are let in",
        )
        verb.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if getattr(args, "shard_gb", None) is not None and args.shard_gb <= 0:
        parser.error(f"--shard-gb {args.shard_gb}: expected a positive number")
    warnings.filterwarnings("ignore", module="megatron")
    from checkpoints_tools.errors import ConvertError
    from checkpoints_tools.memory import keep_freed_memory

    keep_freed_memory()
    asked: list[int] = []

    def stop(number: int, _: object) -> None:
        asked.append(number)
        raise KeyboardInterrupt

    try:
        with handled_by(stop):
            code, result = _run(args)
    except ConvertError as error:
        print(f"megalong-convert {args.verb}: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except BaseException as error:
        # A module that is interrupted while it is imported may turn the exception into another.
        if not asked and not isinstance(error, KeyboardInterrupt):
            raise
        print(f"megalong-convert {args.verb}: interrupted, nothing was written", file=sys.stderr)  # noqa: T201
        return 130
    print(json.dumps(result, indent=2) if args.json else _as_text(result))  # noqa: T201
    return code


def _run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    # torch and megatron-core are imported here, so that --help is quick.
    if "torch" not in sys.modules:
        # Nothing is compiled here, but megatron-core's decorators would import the compiler: a second and a half.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    import torch

    if args.verb == "inspect":
        from checkpoints_tools.describe import describe

        return 0, asdict(describe(args.folder, checksum=not args.no_checksum, allow_pickle=args.allow_pickle))
    from checkpoints_tools.compare import verify
    from checkpoints_tools.convert import hf_to_megatron, megatron_to_hf

    dtype = {"bf16": torch.bfloat16, "float32": torch.float32}.get(getattr(args, "dtype", "keep"))
    pickled = {"allow_pickle": args.allow_pickle}
    if args.verb == "hf-to-megatron":
        settings = {"dtype": dtype, "tp": args.tp, "pp": args.pp, "dry_run": args.dry_run}
        return 0, asdict(hf_to_megatron(args.hf, args.out, **settings, **pickled))
    if args.verb == "megatron-to-hf":
        shard_bytes = None if args.shard_gb is None else int(args.shard_gb * 1e9)
        settings = {"dtype": dtype, "shard_bytes": shard_bytes, "dry_run": args.dry_run}
        return 0, asdict(megatron_to_hf(args.megatron, args.like, args.out, **settings, **pickled))
    compared = verify(args.a, args.b, like=args.like, dtype=dtype, **pickled)
    return int(not compared.equal), {"equal": compared.equal, **asdict(compared)}


def _as_text(result: dict[str, Any]) -> str:
    """One line per value; long lists one line per item."""
    lines = []
    for name, value in result.items():
        if isinstance(value, list | tuple) and value:
            rows = [" ".join(map(str, row.values())) if isinstance(row, dict) else str(row) for row in value]
            lines += [f"{name}:", *(f"  {row}" for row in rows)]
        elif isinstance(value, dict):
            lines.append(f"{name}: " + ", ".join(f"{key}={item}" for key, item in value.items()))
        else:
            lines.append(f"{name}: {value}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
