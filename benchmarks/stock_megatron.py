"""B7's public baseline: megatron-core's own GPTModel, as it comes, on a plain sequence.

Its layers, its attention (Transformer Engine's on a GPU), its context parallelism (p2p, the fastest of its forms in
this case), full recomputation of each layer; the weights and tokens are those of our `sequence`, so that the
log-probabilities must be ours. Forward + backward; the sum of gradients over the GPUs is left out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from sessions import OUT_OF_MEMORY, median_step, report
from steps import Bench, Case, Watch, is_out_of_memory, peak_gb, reset_peak, some_of
from torch import Tensor, nn

from megalong.models.gpt import transformer_config
from megalong.models.gpt_shape import GptShape
from megalong.parallel.collectives import gather_objects
from megalong.parallel.layout import ParallelLayout, destroy_layout
from megalong.records import PolicyBatch

LARGEST_GAP = 0.25
"""Of a log-probability: bfloat16 is off by a few hundredths, and those of different tokens by whole nats."""


class HeadOfRows(nn.Module):
    """megatron's output head on the rows that predict a response token, as ours: logits of all would be 40 GB."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head, self.rows_R = head, torch.empty(0, dtype=torch.int64)

    def forward(self, hidden_TBD: Tensor, **how: Any) -> tuple[Tensor, Tensor | None]:
        return self.head(hidden_TBD[self.rows_R], **how)


def stock_model(shape: GptShape, layout: ParallelLayout, *, vocab: int) -> GPTModel:
    """megatron-core's model of the sizes, weights as they were allocated. vocab: padded."""
    on_gpu = layout.device.type == "cuda"
    config = transformer_config(
        shape, tp=layout.tp_size, cp=layout.context.size, pp=1, sequence_parallel=False, dtype=torch.bfloat16,
        recompute=True, on_gpu=on_gpu,
    )  # fmt: skip
    config.mrope_section, config.apply_rope_fusion, config.cp_comm_type = None, on_gpu, "p2p"  # as it comes
    spec = get_gpt_layer_with_transformer_engine_spec() if on_gpu else get_gpt_layer_local_spec(normalization="RMSNorm")
    model = GPTModel(
        config, spec, vocab_size=vocab, max_sequence_length=shape.max_positions, position_embedding_type="rope",
        rotary_base=int(shape.rope_theta), seq_len_interpolation_factor=shape.rope_scaling, parallel_output=True,
    )  # fmt: skip
    model.output_layer = HeadOfRows(model.output_layer)
    return model.to(device=layout.device, dtype=torch.bfloat16)


@torch.no_grad()
def take_weights(model: GPTModel, ours: nn.Module) -> None:
    """Those of our LLM, under the same names."""
    given = dict(ours.named_parameters())
    for name, parameter in model.named_parameters():
        parameter.copy_(given.pop(name.replace("output_layer.head.", "output_layer.")))
    if given:
        raise RuntimeError(f"stock megatron-core has no parameters {sorted(given)}")


class StockStep:
    """Forward and backward of one plain sequence of a prompt and a response."""

    def __init__(self, model: GPTModel, layout: ParallelLayout, pack: PolicyBatch) -> None:
        self.model, self.layout, device = model, layout, layout.device
        ids_T, targets_R = pack.tokens.ids_T.to(device), pack.tokens.targets_R.to(device)
        targets_T = torch.full_like(ids_T, -1)
        targets_T[-len(targets_R) - 1 : -1] = targets_R  # the response is the end of the sequence
        mine_T = zigzag(torch.arange(len(ids_T), device=device), layout)
        self.ids_BT, self.places_BT, targets_T = ids_T[None, mine_T], mine_T[None], targets_T[mine_T]
        self.rows_R = targets_T.ge(0).nonzero()[:, 0]
        self.targets_R, self.places_R = targets_T[self.rows_R], mine_T[self.rows_R].tolist()
        # megatron's CPU attention makes the mask that it was not given on a GPU
        above = None if device.type == "cuda" else torch.ones(len(ids_T), len(ids_T), dtype=torch.bool).triu(1)
        self.mask = None if above is None else above[None, None]

    def run(self) -> dict[str, Any]:
        watch = Watch(self.layout.device)
        self.model.output_layer.rows_R = self.rows_R
        self.model.zero_grad(set_to_none=True)
        dist.barrier()
        watch.enter("forward")
        logits_RV = self.model(self.ids_BT, self.places_BT, self.mask)[0]
        nll_R = F.cross_entropy(logits_RV.float(), self.targets_R, reduction="none")
        watch.enter("backward")
        nll_R.sum().backward()
        watch.enter("")
        found = dict(zip(self.places_R, (-nll_R).tolist(), strict=True))
        everyone = gather_objects((watch.seconds, found, peak_gb(self.layout.device)), group=self.layout.world)
        phases = {name: max(seconds[name] for seconds, _, _ in everyone) for name in watch.seconds}
        logprobs = [value for _, value in sorted(item for _, part, _ in everyone for item in part.items())]
        return {
            "seconds": sum(phases.values()),
            "phases": phases,
            "peak_gb": [peak for _, _, peak in everyone],
            "mean_nll": -sum(logprobs) / len(logprobs),
            "logprobs": some_of(logprobs),
        }


def zigzag(rows_T: Tensor, layout: ParallelLayout) -> Tensor:
    """This rank's share of a sequence as megatron-core's context parallelism has it."""
    chunks, rank = rows_T.chunk(2 * layout.context.size), layout.context.rank
    return torch.cat((chunks[rank], chunks[-1 - rank]))


def work(session: dict[str, Any], line: Callable[[dict[str, Any]], str]) -> None:
    """The one point of the session, as sessions.work does ours. A rank that runs out of memory ends the process."""
    (point,) = session["points"]
    bench = Bench(Path(session["folder"]), session["overrides"], vision=False)
    row, case = {**point, "world": bench.layout.world_size}, Case(**point["case"])
    try:
        ours, layout = bench.trainer.model, bench.layout
        model = stock_model(ours.spec.gpt, layout, vocab=len(ours.llm.head_weight) * layout.tp_size)
        take_weights(model, ours.llm)
        check(model, bench, replace(case, text=min(case.text, 4096 - case.response)))
        (pack,) = bench.packs(case, mode="stage1+2")
        del ours
        bench.close()
        step = StockStep(model, layout, pack)
        reset_peak(layout.device)
        row |= {"status": "measured", **median_step([step.run() for _ in range(1 + point["timed"])][1:])}
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        report(row | {"status": "out of memory"}, session, line)
        os._exit(OUT_OF_MEMORY)
    if bench.layout.is_main:
        report(row, session, line)
    destroy_layout()


def check(model: GPTModel, bench: Bench, case: Case) -> None:
    """Its log-probabilities are those of our step. Raises SystemExit where they are not: nothing is timed then."""
    packs = bench.packs(case, mode="stage1+2")
    ours = bench.step(packs, mode="stage1+2", recompute="full")["logprobs"]
    far = gap(ours, StockStep(model, bench.layout, packs[0]).run()["logprobs"], what="stock megatron-core and ours")
    if bench.layout.is_main:
        print(f"stock megatron-core, {case.text} + {case.response} tokens: log-probabilities {far:.1e} off", flush=True)


def gap(logprobs: Sequence[float], others: Sequence[float], *, what: str) -> float:
    """Largest difference of a log-probability. Raises SystemExit when they cannot be of the same work."""
    far = max(abs(a - b) for a, b in zip(logprobs, others, strict=True))
    if not far < LARGEST_GAP:
        raise SystemExit(f"{what}: log-probabilities differ by {far:.2e}")
    return far
