"""An MLP of SmolLM2's size on 2,048 tokens: each format against the dense layers, forward alone and with training.

    python benchmarks/layer_speed.py

Speed-ups over the dense MLP, median of rounds in turns; `limit` is what the removed multiplications allow. `old pivot`
is the pivot layer with a concatenation and an index copy, which this project had first.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _record import record
from torch import Tensor, nn

from sparsekd.models.forms._layers import ColumnPivotLinear, LowRankLinear, RowPivotLinear
from sparsekd.models.forms.lowrank import rank_for

TOKENS, HIDDEN, NEURONS, ROUNDS = 2048, 576, 1536, 15


class OldPivotLinear(nn.Module):
    def __init__(self, inputs: int, outputs: int, rank: int):
        super().__init__()
        self.pivots, self.rest = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs - rank, bias=False)
        self.register_buffer("order", torch.randperm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        z = self.pivots(x)
        return torch.cat([z, self.rest(z)], dim=-1).index_select(-1, self.order)


def mlp(gate: nn.Module, up: nn.Module, down: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: down(F.silu(gate(x)) * up(x))


def build(reduction: float) -> dict[str, list[nn.Module]]:
    budget = (1 - reduction) * HIDDEN * NEURONS
    pivot, plain = (rank_for(HIDDEN, NEURONS, budget, name) for name in ("pivot", "lowrank"))
    writing, reading = (HIDDEN, NEURONS), (NEURONS, HIDDEN)
    return {
        "dense": [nn.Linear(*shape, bias=False) for shape in (writing, writing, reading)],
        "lowrank": [LowRankLinear(*shape, plain) for shape in (writing, writing, reading)],
        "pivot": [RowPivotLinear(*writing, pivot), RowPivotLinear(*writing, pivot), ColumnPivotLinear(*reading, pivot)],
        "old pivot": [OldPivotLinear(*shape, pivot) for shape in (writing, writing, reading)],
    }


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(TOKENS, HIDDEN)
    figures: dict[str, Any] = {}
    for reduction in (0.15, 0.35, 0.65):
        layers = build(reduction)
        seconds: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in layers} for kind in ("run", "train")}
        for number in range(ROUNDS + 1):
            for name, parts in layers.items():
                function = mlp(*parts)
                with torch.no_grad():
                    start = time.perf_counter()
                    function(x)
                    run = time.perf_counter() - start
                start = time.perf_counter()
                function(x).square().mean().backward()
                if number:  # the first round warms up
                    seconds["run"][name].append(run)
                    seconds["train"][name].append(time.perf_counter() - start)
        for kind, times in seconds.items():
            dense = statistics.median(times["dense"])
            figures[f"{kind}, {reduction:.0%}"] = {
                name: round(dense / statistics.median(values), 3) for name, values in times.items()
            } | {"limit": round(1 / (1 - reduction), 3)}
    record("layer_speed", figures)


if __name__ == "__main__":
    main()
