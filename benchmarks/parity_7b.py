"""Logits of a random 7B decoder in bf16 against transformers, on the same weights and tokens.

Both are compared with transformers in float32: ours (Transformer Engine layers, any tensor-parallel size) may be no
further from it than transformers' own bfloat16 is, within --slack. One GPU per tensor-parallel rank:

    python benchmarks/parity_7b.py [--tokens 4096] [--layers 28] [--json FILE] [--tiny]
    torchrun --nproc-per-node 2 benchmarks/parity_7b.py --tp 2
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from b2_train_step import hf_model
from steps import Bench, fill_randomly, free, make_folder, parallel_overrides, parser_of, save
from torch import Tensor

from megalong.attention.shard import shard_tokens
from megalong.engine.build import build_model
from megalong.parallel.collectives import broadcast_object
from megalong.parallel.layout import destroy_layout
from megalong.records import Segment, TokenBatch


@torch.no_grad()
def our_logits(bench: Bench, tokens: TokenBatch) -> Tensor:
    """[T - 1, V] float32 of all rows but the last, on every rank. The model alone: no gradients, no optimizer."""
    config, layout = bench.config, bench.layout
    model = build_model(config.model, layout, sequence_parallel=config.parallel.sequence_parallel, load=False)
    fill_randomly(model, layout)
    hidden_RD = model(shard_tokens(tokens, layout.context, part=model.llm.sequence_part), None)
    local_RV = (hidden_RD @ model.llm.head_weight.t()).float()
    shards = [torch.empty_like(local_RV) for _ in range(layout.tp_size)]
    dist.all_gather(shards, local_RV, group=layout.tp)
    return torch.cat(shards, dim=1)[:, : bench.shape.vocab]


def one_sequence(count: int, vocab: int) -> TokenBatch:
    """A prompt of one token and a response of the others: every row predicts the next one."""
    ids_T = torch.randint(vocab, (count,), generator=torch.Generator().manual_seed(1))
    return TokenBatch(
        ids_T=ids_T, positions_T=torch.arange(count), selections=(), rows_R=torch.arange(count - 1),
        segments=(Segment(start=0, length=1, parent=-1), Segment(start=1, length=count - 1, parent=0)),
        targets_R=ids_T[1:], response_R=torch.zeros(count - 1, dtype=torch.int64),
    )  # fmt: skip


@torch.no_grad()
def hf_logits(bench: Bench, tokens: TokenBatch, *, exact: bool) -> Tensor:
    """[T - 1, V] float32 of transformers' model with bfloat16 weights, computed in float32 when `exact`."""
    model = hf_model(bench).eval()
    model = model.float() if exact else model
    return model(input_ids=tokens.ids_T[None].to(model.device), use_cache=False).logits[0, :-1].float()


def main(argv: Sequence[str] | None = None) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    parser = parser_of(__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--slack", type=float, default=1.1)
    args = parser.parse_args(argv)
    # One folder for all ranks: the launcher's rank 0 makes it where everybody finds it.
    folder = Path(tempfile.gettempdir()) / f"parity_7b_{os.environ.get('MASTER_PORT', os.getpid())}_{args.tp}"
    if int(os.environ.get("RANK", "0")) == 0:
        make_folder(folder, layers=args.layers or (2 if args.tiny else 28), tiny=args.tiny)
    while not (folder / "recipe.yaml").is_file():
        time.sleep(0.1)
    bench = Bench(folder, [*args.overrides, *parallel_overrides(gpus=args.tp, tp=args.tp)], vision=False)
    layout, tokens = bench.layout, one_sequence(args.tokens, bench.shape.vocab)
    got_RV = our_logits(bench, tokens)
    free(layout.device)
    row = None
    if layout.is_main:
        half_RV = hf_logits(bench, tokens, exact=False)
        free(layout.device)
        want_RV = hf_logits(bench, tokens, exact=True)
        size = want_RV.norm()
        row = {
            "tp": args.tp, "tokens": args.tokens, "layers": bench.shape.layers,
            "ours": ((got_RV - want_RV).norm() / size).item(), "hf": ((half_RV - want_RV).norm() / size).item(),
            "ours_against_hf": ((got_RV - half_RV).norm() / size).item(),
            "same_argmax": (got_RV.argmax(-1) == want_RV.argmax(-1)).float().mean().item(),
            "hf_same_argmax": (half_RV.argmax(-1) == want_RV.argmax(-1)).float().mean().item(),
        }  # fmt: skip
        print(
            f"tp={args.tp}, {args.tokens} tokens, {row['layers']} layers: relative error against float32: ours "
            f"{row['ours']:.3e}, transformers bf16 {row['hf']:.3e}; between the two {row['ours_against_hf']:.3e}; the "
            f"float32 argmax is found in {row['same_argmax']:.2%} of the rows (transformers bf16 "
            f"{row['hf_same_argmax']:.2%})",
            flush=True,
        )
        save(args.json, [row])
    row = broadcast_object(row, source=0, group=layout.world)
    destroy_layout()
    if row["ours"] > args.slack * row["hf"]:
        raise SystemExit(f"ours is further from float32 than {args.slack} times transformers' bfloat16")


if __name__ == "__main__":
    main()
