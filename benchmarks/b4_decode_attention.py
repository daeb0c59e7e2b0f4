"""B4: attention of one decoded token for each of G responses that share a prefix, one layer, bf16. One GPU.

    python benchmarks/b4_decode_attention.py [--prefix 131072 925456] [--heads 28/4 7/1] [--json FILE] [--tiny]

Every response has --length tokens of its own behind the prefix. Checked first, at every size: the output of each form
against plain PyTorch in float32. Then times, from a CUDA graph, in which the call is repeated over so many layers that
none finds its keys in the L2 cache:

sdpa                 torch, one call per response, each with its own copy of the prefix
sdpa batched         torch, one call
vllm                 vLLM's decode step: FlashAttention over the paged cache in which the responses share the prefix's
                     blocks. Read once per response all the same. At most 32 splits is what its full CUDA graphs have.
vllm cascade         vLLM's cascade attention (ModelConfig.disable_cascade_attn=False), at most N splits: the prefix is
                     read once, all rows of the group in one call; the responses' own keys in a second one; merged
shared, torch        the same with torch's kernels: rows of the G responses and of a key head's query heads folded
                     (dense keys; the second call over padded rows)

bound: bytes of keys and values that must be read, once per response or once per group, at 4.3 TB/s.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from steps import save
from torch import Tensor

from megalong.attention.kernels import KERNELS
from megalong.attention.pack import merge_into

BANDWIDTH = 4.3e12
"""Bytes per second that an H200 reads, measured."""
BLOCK = 16
"""Tokens of a block of vLLM's cache (its default)."""
LARGEST_ERROR = 2e-2
"""Of the output, relative to its norm: bf16."""
L2_BYTES = 512 * 2**20
"""Keys and values that push everything before them out of the L2 cache (50 MB), many times over."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of one layer on one rank."""

    heads: int
    kv_heads: int
    width: int
    prefix: int  # a multiple of BLOCK
    responses: int
    length: int  # tokens of each response so far, the one that is decoded included

    @property
    def scale(self) -> float:
        return self.width**-0.5

    def bytes_read(self, *, shared: bool) -> int:
        """Keys and values, bf16."""
        tokens = self.prefix * (1 if shared else self.responses) + self.responses * self.length
        return tokens * 2 * self.kv_heads * self.width * 2


class Layer:
    """Queries, and keys and values as vLLM keeps them.

    query_GHd: [G, heads, width]. cache: [blocks, 2 (keys, values), BLOCK, kv heads, width], the prefix's blocks first,
    then those of each response. blocks_GB: int32, the blocks of each response.
    """

    def __init__(self, shape: Shape, *, device: torch.device, seed: int) -> None:
        self.shape, self.device = shape, device
        generator = torch.Generator(device).manual_seed(seed)
        prefix, own = shape.prefix // BLOCK, -(-shape.length // BLOCK)
        random = {"dtype": torch.bfloat16, "device": device, "generator": generator}
        self.query_GHd = torch.randn(shape.responses, shape.heads, shape.width, **random)
        self.cache = torch.randn(prefix + shape.responses * own, 2, BLOCK, shape.kv_heads, shape.width, **random)
        shared = torch.arange(prefix).expand(shape.responses, -1)
        theirs = prefix + torch.arange(shape.responses * own).view(shape.responses, own)
        self.blocks_GB = torch.cat([shared, theirs], dim=1).to(device, torch.int32)

    def prefix_keys(self) -> list[Tensor]:
        """Keys and values of the prefix, [kv heads, P, width]."""
        return [self._dense(self.cache[: self.shape.prefix // BLOCK, part]) for part in (0, 1)]

    def own_keys(self, response: int) -> list[Tensor]:
        """Keys and values of a response's own tokens, [kv heads, length, width]."""
        blocks = self.cache[self.blocks_GB[response, self.shape.prefix // BLOCK :].long()]
        return [self._dense(blocks[:, part])[:, : self.shape.length] for part in (0, 1)]

    def all_keys(self, response: int) -> list[Tensor]:
        """[kv heads, P + length, width], a copy."""
        return [torch.cat(pair, dim=1) for pair in zip(self.prefix_keys(), self.own_keys(response), strict=True)]

    @staticmethod
    def _dense(blocks: Tensor) -> Tensor:
        return blocks.flatten(0, 1).transpose(0, 1)


def definition(layer: Layer) -> Tensor:
    """[G, heads, width] float32, in plain PyTorch."""
    shape, rows = layer.shape, []
    for response in range(shape.responses):
        key_KTd, value_KTd = layer.all_keys(response)
        query_KQd = layer.query_GHd[response].float().view(shape.kv_heads, -1, shape.width)
        heads = zip(query_KQd, key_KTd, value_KTd, strict=True)  # one at a time: float32 copies of their keys are large
        rows.append(torch.cat([torch.softmax(q @ k.float().T * shape.scale, -1) @ v.float() for q, k, v in heads]))
    return torch.stack(rows)


Form = Callable[[Layer], Callable[[], Tensor]]
"""Prepares what does not count as time (dense keys, metadata); returns the call, [G, heads, width] bf16."""


def sdpa(layer: Layer) -> Callable[[], Tensor]:
    shape = layer.shape
    keys = [[part[None].contiguous() for part in layer.all_keys(index)] for index in range(shape.responses)]
    queries = [row[None, :, None] for row in layer.query_GHd]

    def run() -> Tensor:
        found = [_sdpa(query, *pair, shape) for query, pair in zip(queries, keys, strict=True)]
        return torch.cat(found)[:, :, 0]

    return run


def sdpa_batched(layer: Layer) -> Callable[[], Tensor]:
    parts = zip(*(layer.all_keys(index) for index in range(layer.shape.responses)), strict=True)
    key, value = (torch.stack(part) for part in parts)
    query = layer.query_GHd[:, :, None]
    return lambda: _sdpa(query, key, value, layer.shape)[:, :, 0]


def _sdpa(query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, scale=shape.scale, enable_gqa=True)


def shared_torch(layer: Layer) -> Callable[[], Tensor]:
    """Prefix in one call of [1, kv heads, G * query heads of one, width], responses in a second one; merged."""
    shape = layer.shape
    folded = shape.heads // shape.kv_heads
    kernel = KERNELS["flash" if layer.device.type == "cuda" else "cpu_flash"].make()
    prefix = [part[None].contiguous() for part in layer.prefix_keys()]
    own = [torch.stack(part) for part in zip(*map(layer.own_keys, range(shape.responses)), strict=True)]
    query_GKQd = layer.query_GHd.view(shape.responses, shape.kv_heads, folded, shape.width)

    def run() -> Tensor:
        rows = query_GKQd.transpose(0, 1).flatten(1, 2)[None]
        out, lse = kernel.forward(rows, *prefix, causal=False, scale=shape.scale)
        out = out[0].unflatten(1, (shape.responses, folded)).transpose(0, 1)
        lse = lse[0].unflatten(1, (shape.responses, folded)).transpose(0, 1)
        own_out, own_lse = kernel.forward(query_GKQd, *own, causal=False, scale=shape.scale)
        merge_into(out, lse, own_out, own_lse)
        return out.flatten(1, 2)

    return run


def vllm_paged(layer: Layer, *, splits: int) -> Callable[[], Tensor]:
    """As FlashAttentionImpl.forward calls it in a decode step."""
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    shape, version = layer.shape, _flash_version()
    key, value = _paged(layer)
    rows = _int32([*range(shape.responses + 1)], layer)
    lengths = _int32([shape.prefix + shape.length] * shape.responses, layer)
    longest = shape.prefix + shape.length
    plan = _schedule(layer, rows, lengths, queries=1, longest=longest, causal=True, splits=splits)
    out = torch.empty_like(layer.query_GHd)

    def run() -> Tensor:
        flash_attn_varlen_func(
            q=layer.query_GHd, k=key, v=value, out=out, cu_seqlens_q=rows, max_seqlen_q=1, seqused_k=lengths,
            max_seqlen_k=longest, softmax_scale=shape.scale, causal=True, block_table=layer.blocks_GB,
            scheduler_metadata=plan, fa_version=version, num_splits=splits,
        )  # fmt: skip
        return out

    return run


def vllm_cascade(layer: Layer, *, splits: int) -> Callable[[], Tensor]:
    """As FlashAttentionImpl.forward calls it when use_cascade_attention says so."""
    from vllm.v1.attention.backends.flash_attn import cascade_attention

    shape, version = layer.shape, _flash_version()
    key, value = _paged(layer)
    rows = _int32([*range(shape.responses + 1)], layer)
    prefix_rows, prefix_lengths = _int32([0, shape.responses], layer), _int32([shape.prefix], layer)
    own_lengths = _int32([shape.length] * shape.responses, layer)
    prefix_plan = _schedule(
        layer, prefix_rows, prefix_lengths, queries=shape.responses, longest=shape.prefix, causal=False, splits=splits
    )
    own_plan = _schedule(layer, rows, own_lengths, queries=1, longest=shape.length, causal=True, splits=splits)
    out = torch.empty_like(layer.query_GHd)

    def run() -> Tensor:
        cascade_attention(
            out, layer.query_GHd, key, value, cu_query_lens=rows, max_query_len=1, cu_prefix_query_lens=prefix_rows,
            prefix_kv_lens=prefix_lengths, suffix_kv_lens=own_lengths, max_kv_len=shape.prefix + shape.length,
            softmax_scale=shape.scale, alibi_slopes=None, sliding_window=(-1, -1), logits_soft_cap=0.0,
            block_table=layer.blocks_GB, common_prefix_len=shape.prefix, max_num_splits=splits, fa_version=version,
            prefix_scheduler_metadata=prefix_plan, suffix_scheduler_metadata=own_plan,
        )  # fmt: skip
        return out

    return run


def _flash_version() -> int:
    from vllm.vllm_flash_attn.flash_attn_interface import is_fa_version_supported

    return 3 if is_fa_version_supported(3) else 2


def _paged(layer: Layer) -> list[Tensor]:
    from vllm.utils.torch_utils import canonicalize_singleton_dim_strides

    return [canonicalize_singleton_dim_strides(part) for part in layer.cache.unbind(1)]


def _int32(values: Sequence[int], layer: Layer) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=layer.device)


def _schedule(
    layer: Layer, rows: Tensor, lengths: Tensor, *, queries: int, longest: int, causal: bool, splits: int
) -> Tensor | None:
    """FlashAttention-3's plan, which vLLM makes once for all layers of a step."""
    from vllm.v1.attention.backends.fa_utils import get_scheduler_metadata

    if _flash_version() != 3:
        return None
    shape = layer.shape
    return get_scheduler_metadata(
        batch_size=len(lengths), max_seqlen_q=queries, max_seqlen_k=longest, num_heads_q=shape.heads,
        num_heads_kv=shape.kv_heads, headdim=shape.width, cache_seqlens=lengths, qkv_dtype=torch.bfloat16,
        cu_seqlens_q=rows, page_size=BLOCK, causal=causal, num_splits=splits,
    )  # fmt: skip


def forms(device: torch.device) -> dict[str, tuple[Form, bool]]:
    """Name -> the form and whether it reads the prefix once for the group."""
    found: dict[str, tuple[Form, bool]] = {"sdpa": (sdpa, False), "sdpa batched": (sdpa_batched, False)}
    if device.type == "cuda" and find_spec("vllm") is not None:
        found["vllm, <= 32 splits"] = (lambda layer: vllm_paged(layer, splits=32), False)
        found["vllm, any splits"] = (lambda layer: vllm_paged(layer, splits=0), False)
        for splits in (32, 64, 128):
            name = f"vllm cascade, <= {splits} splits"
            found[name] = (lambda layer, splits=splits: vllm_cascade(layer, splits=splits), True)
    else:
        print("vllm: left out, it needs a GPU and the package vllm")
    return {**found, "shared, torch": (shared_torch, True)}


def microseconds(
    calls: Sequence[Callable[[], Tensor]], device: torch.device, *, repeats: int
) -> tuple[list[float], Tensor]:
    """Of one call, `repeats` times: all of them in turn, from one CUDA graph on a GPU; and the first call's output."""
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            outputs = [call() for call in calls]
            times.append((time.perf_counter() - started) * 1e6 / len(calls))
        return times, outputs[0]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        outputs = [call() for call in calls]
    times = []
    for index in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if index >= 3:
            times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return times, outputs[0]


def check(name: str, found: Tensor, exact: Tensor) -> float:
    error = ((found.float() - exact).norm() / exact.norm()).item()
    if not error <= LARGEST_ERROR:
        raise SystemExit(f"{name}: relative error {error:.2e} against plain PyTorch, expected at most {LARGEST_ERROR}")
    return error


def measure(name: str, form: Form, layers: Sequence[Layer], exact: Tensor, *, shared: bool, repeats: int) -> dict:
    """One row; ends the program when an output is wrong, before the times or after them (from the CUDA graph)."""
    shape, device = layers[0].shape, layers[0].device
    calls = [form(layer) for layer in layers]
    error = check(name, calls[0](), exact)
    times, output = microseconds(calls, device, repeats=repeats)
    error = max(error, check(name, output, exact))
    us = statistics.median(times)
    rate = shape.bytes_read(shared=shared) / us / 1e-6
    return {
        "form": name, "us": us, "spread_us": (min(times), max(times)), "error": error, "layers": len(layers),
        "bound_us": shape.bytes_read(shared=shared) / BANDWIDTH * 1e6, "of_bandwidth": rate / BANDWIDTH,
    }  # fmt: skip


def run(shape: Shape, *, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """All forms at one size, rows printed as they come; a form that does not run is a row that says why."""
    first = Layer(shape, device=device, seed=0)
    exact, rows = definition(first), []
    for name, (form, shared) in forms(device).items():
        # Dense copies of the prefix for each response are larger than the L2 cache by themselves.
        count = 1 if name.startswith("sdpa") or device.type != "cuda" else -(-L2_BYTES // shape.bytes_read(shared=True))
        layers = [first, *(Layer(shape, device=device, seed=seed) for seed in range(1, count))]
        row = {"heads": f"{shape.heads}/{shape.kv_heads}", "prefix": shape.prefix, "responses": shape.responses}
        try:
            row |= measure(name, form, layers, exact, shared=shared, repeats=repeats)
        except (RuntimeError, AssertionError) as error:
            row |= {"form": name, "failed": f"{type(error).__name__}: {error}"}
        rows.append(row)
        print(line(row, rows), flush=True)
        del layers
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def line(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    label = f"{row['heads']:>5} P={row['prefix']:7} {row['form']:27}"
    if "failed" in row:
        return f"{label} failed: {row['failed'][:300]}"
    low, high = row["spread_us"]
    text = f"{label} {row['us']:9.1f} us ({low:.1f} to {high:.1f}), {100 * row['of_bandwidth']:5.1f} % of 4.3 TB/s"
    for baseline in ("sdpa", "vllm, <= 32 splits"):
        text += "".join(f", {base['us'] / row['us']:5.2f} x {baseline}" for base in rows if base["form"] == baseline
                        and "us" in base and base is not row)  # fmt: skip
    return f"{text}, error {row['error']:.1e}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefix", type=int, nargs="+", default=[131072, 925456])
    parser.add_argument("--heads", nargs="+", default=["28/4", "7/1"], metavar="QUERY/KEY")
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="tokens of each response so far")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the script on a CPU")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prefixes, length, repeats = ([64, 160], 21, 2) if args.tiny else (args.prefix, args.length, args.repeats)
    rows: list[dict[str, Any]] = []
    for prefix in prefixes:
        for pair in args.heads:
            heads, kv_heads = map(int, pair.split("/"))
            shape = Shape(
                heads=heads, kv_heads=kv_heads, width=128, prefix=prefix // BLOCK * BLOCK, responses=args.responses,
                length=length,
            )  # fmt: skip
            rows += run(shape, device=device, repeats=repeats)
            save(args.json, rows)  # what is there so far


if __name__ == "__main__":
    main()
