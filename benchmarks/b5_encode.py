"""B5: frames to embeddings: SigLIP-448 and the projector of LongVILA 7B, random weights, bf16. One GPU.

    python benchmarks/b5_encode.py [--frames 3600] [--batch 256] [--rounds 3] [--json FILE] [--tiny]

hf        transformers' SiglipVisionModel (SDPA, all layers, its hidden states), 64 frames at a time, then the projector
ours      the encoder that runs train with: the layers up to the one whose output is used, --batch frames at a time
from host the same, the frames in page-locked memory, as the decoder leaves them
compiled  the same encoder, each of its layers through torch.compile; no run uses it

All take uint8 frames and scale them on the device. Checked first, on 8 frames: hf and ours, in bf16, against hf in
float32, and against each other. Then rounds of all forms in turn. MFU counts the operations of the layers
that are used.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from steps import PEAK, free, make_folder, peak_gb, random_tensor, reset_peak, save
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from megalong.config.shapes import read_model_shape
from megalong.config.tree import VideoConfig
from megalong.models.longvila.spec import LongVilaSpec, read_spec
from megalong.models.longvila.tower import Projector, VisionEncoder

HF_BATCH = 64
LARGEST_ERROR = 3e-2
"""Of the embeddings, relative to their norm, bf16 against float32."""


class HfEncoder(nn.Module):
    """The tower as VILA runs it: transformers' model, one of its hidden states, the projector."""

    def __init__(self, spec: LongVilaSpec) -> None:
        super().__init__()
        config = SiglipVisionConfig(**{**spec.tower_config, "vision_use_head": False})
        config._attn_implementation = "sdpa"
        self.tower = SiglipVisionModel(config)
        self.select_layer = spec.vision.select_layer
        self.projector = Projector(
            vision_hidden=spec.vision.hidden, hidden=spec.gpt.hidden, factor=spec.vision.downsample
        )

    def forward(self, frames_FHWC: Tensor) -> Tensor:
        dtype = self.projector.layers[2].weight.dtype
        pixels = frames_FHWC.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1.0
        states = self.tower(pixel_values=pixels.to(dtype), output_hidden_states=True).hidden_states
        return self.projector(states[self.select_layer])


@torch.no_grad()
def build(spec: LongVilaSpec, device: torch.device) -> tuple[HfEncoder, VisionEncoder]:
    """Both with the same random bf16 weights."""
    hf, ours = (kind(spec).to(device, torch.bfloat16).eval() for kind in (HfEncoder, VisionEncoder))
    for name, parameter in hf.named_parameters():
        parameter.copy_(random_tensor(name, parameter.shape, device=device))
    tower = getattr(hf.tower, "vision_model", hf.tower)  # transformers before 5.20 nests it
    ours.embeddings.load_state_dict(tower.embeddings.state_dict())
    ours.projector.load_state_dict(hf.projector.state_dict())
    for layer, source in zip(ours.encoder.layers, tower.encoder.layers, strict=False):  # the last is not in ours
        layer.load_state_dict(source.state_dict())
    return hf, ours


def compiled(encoder: VisionEncoder) -> VisionEncoder:
    """A copy, its layers compiled: they are alike, so that one compilation serves all."""
    found = copy.deepcopy(encoder)
    for layer in found.encoder.layers:
        layer.compile(dynamic=False)
    return found


def random_frames(count: int, side: int, device: torch.device) -> Tensor:
    """[count, side, side, 3] uint8."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randint(256, (count, side, side, 3), dtype=torch.uint8, device=device, generator=generator)


@torch.no_grad()
def check(hf: HfEncoder, others: dict[str, nn.Module], frames_FHWC: Tensor) -> dict[str, float]:
    """Relative error of each against hf in float32, and `ours, hf` against hf itself; ends the program beyond
    LARGEST_ERROR."""
    half = hf(frames_FHWC)
    exact = hf.float()(frames_FHWC)
    hf.to(torch.bfloat16)
    errors = {"hf": error_of(half, exact)}
    for name, module in others.items():
        found = module(frames_FHWC)
        errors |= {name: error_of(found, exact), f"{name}, hf": error_of(found, half)}
    for name, error in errors.items():
        if not error <= LARGEST_ERROR:
            raise SystemExit(f"{name}: relative error {error:.2e}, expected at most {LARGEST_ERROR}")
    return errors


def error_of(found: Tensor, exact: Tensor) -> float:
    return ((found.float() - exact.float()).norm() / exact.float().norm()).item()


@torch.no_grad()
def encode(encoder: Callable[[Tensor], Tensor], frames_FHWC: Tensor, *, batch: int, device: torch.device) -> Tensor:
    """[F, tokens, D]; frames are copied to the device first, all of them, as the vision stage does."""
    parts = frames_FHWC.to(device, non_blocking=True).split(batch)
    return torch.cat([encoder(part) for part in parts])


def timed(work: Callable[[], Tensor], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=3600)
    parser.add_argument("--batch", type=int, default=256, help="frames of a forward of ours (video.tower_batch_frames)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled form out")
    parser.add_argument("--json")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the script on a CPU")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_folder(Path(scratch) / "run", layers=1, tiny=args.tiny) / "model"
        spec = read_spec(folder)
        flops = read_model_shape(str(folder), family="longvila", video=VideoConfig()).vision.frame_flops
    count, batch = (12, 8) if args.tiny else (args.frames, args.batch)
    hf, ours = build(spec, device)
    encoders: dict[str, nn.Module] = {"ours": ours}
    if not args.no_compile and not args.tiny:
        encoders["compiled"] = compiled(ours)
    rows: list[dict[str, Any]] = [{"errors": check(hf, encoders, random_frames(8, spec.vision.image_size, device))}]
    print(
        "relative error: " + ", ".join(f"{name} {error:.1e}" for name, error in rows[0]["errors"].items()), flush=True
    )
    frames_FHWC = random_frames(count, spec.vision.image_size, device)
    on_host = frames_FHWC.cpu().pin_memory() if device.type == "cuda" else frames_FHWC
    forms: dict[str, tuple[nn.Module, Tensor, int]] = {
        f"hf, {HF_BATCH} frames": (hf, frames_FHWC, HF_BATCH),
        f"hf, {batch} frames": (hf, frames_FHWC, batch),
        f"ours, {HF_BATCH} frames": (ours, frames_FHWC, HF_BATCH),
        f"ours, {batch} frames": (ours, frames_FHWC, batch),
        f"ours, {batch} frames, from host": (ours, on_host, batch),
    }
    if "compiled" in encoders:
        forms[f"compiled, {batch} frames"] = (encoders["compiled"], frames_FHWC, batch)
    seconds = measure(forms, device, rounds=args.rounds)
    for name in forms:
        median = statistics.median(seconds[name])
        row = {
            "form": name, "seconds": median, "spread": (min(seconds[name]), max(seconds[name])),
            "frames_per_s": count / median, "mfu": flops * count / median / PEAK, "peak_gb": seconds[f"{name} peak"][0],
            "ratio": statistics.median(seconds[f"hf, {HF_BATCH} frames"]) / median,
        }  # fmt: skip
        rows.append(row)
        print(
            f"{name:30} {row['seconds']:8.3f} s ({row['spread'][0]:.3f} to {row['spread'][1]:.3f}), "
            f"{row['frames_per_s']:7.0f} frames/s, MFU {100 * row['mfu']:4.1f} %, {row['ratio']:.2f} x hf, "
            f"peak {row['peak_gb']:.1f} GB",
            flush=True,
        )
    save(args.json, rows)


def measure(
    forms: dict[str, tuple[nn.Module, Tensor, int]], device: torch.device, *, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each round, and `<form> peak` in GB; the forms take turns, a batch of each warms up first."""
    found: dict[str, list[float]] = {}
    for encoder, frames_FHWC, batch in forms.values():
        rest = len(frames_FHWC) % batch or batch
        for part in (frames_FHWC[:batch], frames_FHWC[:rest]):  # both shapes: torch.compile makes code for each
            encode(encoder, part, batch=batch, device=device)
    for number in range(rounds):
        for name, (encoder, frames_FHWC, batch) in forms.items():
            free(device)
            reset_peak(device)
            seconds = timed(lambda e=encoder, f=frames_FHWC, b=batch: encode(e, f, batch=b, device=device), device)
            found.setdefault(name, []).append(seconds)
            found[f"{name} peak"] = [peak_gb(device)]
            print(f"round {number + 1}: {name}: {len(frames_FHWC) / seconds:.0f} frames/s", file=sys.stderr, flush=True)
    return found


if __name__ == "__main__":
    main()
