"""Time and peak memory of megalong-convert on a 7B LongVILA-layout checkpoint, beside a file copy and a naive way.

    python benchmarks/convert_7b.py [--layers 28] [--naive-layers 4] [--folder DIR]

Makes a checkpoint of random bfloat16 weights in the shapes of launch/shapes/longvila_7b, converts it both ways, checks
that every bit comes back, prints a table, and deletes everything. Needs about 50 GB of disk at full size. Each step
runs in a process of its own and reads its input from disk: the page cache is dropped for the files before. All steps
end with their output flushed to disk.

The naive way is what one writes without this tool: build the model, load the weights into it, save it with
megatron-core's dist_checkpointing. It holds the whole model in memory, so it is measured at --naive-layers, beside the
converter at the same size; all 28 layers need about 25 GB of free memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHAPES = ROOT / "launch" / "shapes" / "longvila_7b"
SHARD_BYTES = 5_000_000_000


def make(hf: Path, layers: str) -> dict:
    """A checkpoint of the 7B shapes with random weights."""
    shutil.copytree(SHAPES, hf)
    for config in hf.rglob("config.json"):
        config.chmod(0o644)
    llm = json.loads((hf / "llm/config.json").read_text())
    (hf / "llm/config.json").write_text(json.dumps({**llm, "num_hidden_layers": int(layers)}))
    return {"bytes": write_weights(hf)}


def write_weights(hf: Path) -> int:
    """Random weights for the sizes in a folder's JSON files, one file at a time; returns their bytes. Every tensor is
    another window of one pool of random numbers."""
    import torch

    from checkpoints_tools.families import FILES
    from checkpoints_tools.places import read_blueprint
    from checkpoints_tools.safetensors_files import SafetensorsFile, Slot, reshard, write_index

    blueprint = read_blueprint(hf)
    slots: dict[str, list[Slot]] = {folder: [] for folder in blueprint.folders}
    for place in blueprint.places:
        for name, shape in zip(place.entry.hf, place.hf_shapes, strict=True):
            folder, _, inner = name.partition("/")
            slots[folder].append(Slot(name=inner, dtype=torch.bfloat16, shape=shape))
    first = {slot.name: slot for slot in slots["vision_tower"]}
    for name in sorted(FILES[blueprint.family].carried(blueprint.spec)[0]):
        inner = "vision_model." + name.removeprefix("vision_tower/")
        if inner not in first:
            twin = first.get(inner.replace("layers.26.", "layers.0."))  # the last block is shaped like the first
            shape = twin.shape if twin else (blueprint.spec.vision.hidden,)
            slots["vision_tower"].append(Slot(name=inner, dtype=torch.bfloat16, shape=shape))
    largest = max(slot.num_bytes for some in slots.values() for slot in some) // 2
    pool = torch.empty(largest + 100_003, dtype=torch.bfloat16).normal_(std=0.02)
    at = 0
    for folder, some in slots.items():
        files = reshard(some, shard_bytes=SHARD_BYTES)
        write_index(hf / folder, files, metadata={})
        for file, members in files.items():
            out = SafetensorsFile(hf / folder / file, members)
            for slot in members:
                at = (at + 7919) % 100_003
                values = pool[at : at + slot.num_bytes // 2].view(slot.shape)
                is_norm = len(slot.shape) == 1 and not slot.name.endswith("bias")
                out.put(slot.name, values + 1 if is_norm else values)
            out.close()
    return sum(slot.num_bytes for some in slots.values() for slot in some)


def copy(source: Path, target: Path) -> dict:
    """Plain file copy: the kernel moves the bytes."""
    shutil.copytree(source, target)
    flush(target)
    return {}


def convert(*argv: str) -> dict:
    from checkpoints_tools.cli import main

    code = main([*argv, "--json"])
    if code:
        raise SystemExit(code)
    return {}


def naive(hf: Path, out: Path) -> dict:
    """Build the model, load the weights, save."""
    from megatron.core import dist_checkpointing

    from megalong.config.tree import Dtype, ModelConfig, Recompute
    from megalong.engine.build import build_model
    from megalong.parallel.layout import make_layout

    layout = make_layout(tp=1, cp=1, pp=1, seed=1)
    config = ModelConfig(path=str(hf), dtype=Dtype.bfloat16, recompute=Recompute.none)
    model = build_model(config, layout, sequence_parallel=False)
    out.mkdir()
    dist_checkpointing.save({"model": model.sharded_state_dict()}, str(out))
    flush(out)
    return {}


STEPS: dict[str, Callable[..., dict]] = {
    "make": lambda hf, layers: make(Path(hf), layers),
    "copy": lambda source, target: copy(Path(source), Path(target)),
    "convert": convert,
    "naive": lambda hf, out: naive(Path(hf), Path(out)),
}


def flush(folder: Path) -> None:
    for file in folder.rglob("*"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def forget(folder: Path) -> None:
    """Drop the folder's files from the page cache."""
    flush(folder)
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def run_step(*argv: object, reads: Path | None = None) -> dict:
    """Run a step in a fresh process. Returns its seconds of work (imports included) and peak memory in bytes."""
    if reads is not None:
        forget(reads)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, __file__, "--step", *map(str, argv)], stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"step {argv[0]} failed with {done.returncode}: {done.stdout[-2000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"{' '.join(map(str, argv[:2]))}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
    return {**result, "wall": time.monotonic() - began}


def step(name: str, *argv: str) -> None:
    began = time.monotonic()
    result = STEPS[name](*argv)
    # A helper process of megatron-core counts too.
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * 1024
    print(json.dumps({**result, "seconds": time.monotonic() - began, "peak": peak}))


def measure(folder: Path, layers: int, *, with_naive: bool) -> list[str]:
    """One table row per way; deletes what it made before it returns."""
    hf, mg, back, other = (folder / name for name in ("hf", "megatron", "back", "other"))
    size = run_step("make", hf, layers)["bytes"]
    copied = run_step("copy", hf, other, reads=hf)
    shutil.rmtree(other)
    rows = [("file copy", copied)]
    if with_naive:
        rows.append(("naive: build, load, save", run_step("naive", hf, other, reads=hf)))
        shutil.rmtree(other)
    rows.append(("hf-to-megatron", run_step("convert", "hf-to-megatron", "--hf", hf, "--out", mg, reads=hf)))
    to_hf = ("convert", "megatron-to-hf", "--megatron", mg, "--like", hf, "--out", back)
    rows.append(("megatron-to-hf", run_step(*to_hf, reads=mg)))
    rows.append(("verify hf back: equal", run_step("convert", "verify", hf, back, reads=back)))
    for path in (hf, mg, back):
        shutil.rmtree(path)
    return [
        f"| {layers} | {size / 1e9:.1f} | {name} | {row['wall']:.1f} | {size / 1e9 / row['wall']:.2f} "
        f"| {copied['wall'] / row['wall']:.2f} | {row['peak'] / 1e9:.2f} |"
        for name, row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--naive-layers", type=int, default=4, help="0: without the naive way")
    parser.add_argument("--folder", type=Path, help="where to make the files (default: the temporary folder)")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="convert_7b_") as folder:
        free = shutil.disk_usage(folder).free
        if free < (needed := 3.1 * (3.2e9 + 0.47e9 * args.layers)):
            raise SystemExit(f"{folder}: {free / 1e9:.0f} GB free, {needed / 1e9:.0f} GB needed")
        if args.naive_layers not in (0, args.layers):
            rows += measure(Path(folder), args.naive_layers, with_naive=True)
        rows += measure(Path(folder), args.layers, with_naive=args.naive_layers == args.layers)
    print("| layers | GB | what | seconds | GB/s | copy time / time | peak memory GB |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--step"]:
        step(*sys.argv[2:])
    else:
        main()
