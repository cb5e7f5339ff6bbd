"""Ideas that could help a truncation survive training, each against the same model without it, at equal time.

    python benchmarks/truncation_hypotheses.py DATA [--arms NAME ...] [--rates 1e-4 3e-4]

Everything is that of truncation_ablation.py at 35 %: the start is `two-sided, no probe` in pivots, the measure strict
perplexity to the dense model's before and after training, each arm at each learning rate.

- `base`: one pass over 100 blocks (25,600 tokens).
- `refined`: before training, the factors of each MLP in turn fit the dense MLP's output on the truncated model's own
  inputs (mean squared error relative to the dense output's, AdamW), layer after layer.
- `anchored`: the same, but what is fitted is the dense model's residual stream after the layer, from the truncated
  model's stream before it: each layer is asked to undo the earlier ones' errors.
- `next cut`: two rounds, 35 % then 51 %. The last tenth of round 1 adds the share of its outputs' energy that round 2
  will cut off (with the cut's directions renewed every step) to the loss; against `two rounds`, the same without.

Refinement costs processor time; that many fewer blocks are trained on, as the base's seconds a block say.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import math
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from _record import RESULTS, record
from torch import nn
from truncation_ablation import Setup, prepare, ratios, train, truncated

from sparsekd import compression
from sparsekd.compression.statistics import Gram
from sparsekd.distillation.objective import Objective
from sparsekd.models.anatomy import find_mlps
from sparsekd.models.forms._layers import CompressedLinear
from sparsekd.models.forms.lowrank import rank_for
from sparsekd.models.layerwise import Layers

NAME, REDUCTION, NEXT, BLOCKS = "truncation_hypotheses", 0.35, 0.51, 100
REFINE_BLOCKS, REFINE_EPOCHS, REFINE_RATE, PENALTY = 32, 2, 3e-4, 1.0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("--arms", nargs="+", default=["base", "refined", "anchored", "two rounds", "next cut"])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4])
    given = parser.parse_args()
    path = RESULTS / f"{NAME}.json"
    found: dict[str, Any] = json.loads(path.read_text())["arms"] if path.exists() else {}
    setup = prepare(given.data, train=True)
    dense = setup.measure(setup.model)
    start, _ = truncated(setup, "two-sided, no probe", REDUCTION)

    def save(arm: str, part: str, value: Any) -> None:
        found.setdefault(arm, {})[part] = value
        record(NAME, {"arms": found}, show=False)
        print(arm, part, value, flush=True)

    for arm, rate in itertools.product(given.arms, given.rates):
        part = f"after, rate {rate:g}"
        if part in found.get(arm, {}):
            continue
        if arm in ("two rounds", "next cut"):
            save(arm, part, _two_rounds(setup, start, rate, dense, arm == "next cut"))
            continue
        student, num_blocks = copy.deepcopy(start), BLOCKS
        if arm != "base":
            clock = time.process_time()
            _refine(setup, student, anchored=arm == "anchored")
            seconds = time.process_time() - clock
            a_block = found["base"][f"after, rate {given.rates[0]:g}"]["seconds_a_block"]
            num_blocks = BLOCKS - math.ceil(seconds / a_block)
            save(arm, "refinement", {"seconds": seconds, "blocks": num_blocks})
        if "before" not in found.get(arm, {}):
            save(arm, "before", ratios(setup.measure(student), dense))
        clock = time.process_time()
        trained = train(setup, student, rate, num_blocks=num_blocks)
        seconds = (time.process_time() - clock) / num_blocks
        save(arm, part, ratios(setup.measure(trained), dense) | {"seconds_a_block": seconds})


def _refine(setup: Setup, student: Any, *, anchored: bool) -> None:
    """Each MLP of the student in turn learns, from the student's own stream, the dense MLP's output or, `anchored`,
    what is missing to the dense stream after the layer."""
    tokens = torch.cat(setup.batches)[:REFINE_BLOCKS]
    ours, theirs = Layers(student), Layers(setup.model)
    with torch.no_grad():
        hidden = torch.cat([ours.record(_decoder(student, row))[0] for row in tokens.split(4)])
        for row in tokens[:4].split(4):
            theirs.record(_decoder(setup.model, row))
    stream = hidden.clone()  # of the dense model
    for number, (mlp, dense_mlp) in enumerate(zip(find_mlps(student), find_mlps(setup.model), strict=True)):
        module = student.get_submodule(mlp.output.rpartition(".")[0])
        dense_module = setup.model.get_submodule(dense_mlp.output.rpartition(".")[0])
        inputs, targets, after = [], [], []
        with torch.no_grad():
            for at in range(0, len(tokens), 4):
                rows = slice(at, at + 4)
                _, dense_out = theirs.run(_decoder(setup.model, tokens[rows]), stream[rows], number, number + 1)
                x, y, out = _through(ours, student, tokens[rows], hidden[rows], number, module)
                inputs.append(x)
                targets.append(dense_out - (out - y) if anchored else dense_module(x))
                after.append(dense_out)
        _fit(module, torch.cat(inputs), torch.cat(targets))
        with torch.no_grad():
            hidden = torch.cat(
                [
                    _through(ours, student, tokens[at : at + 4], hidden[at : at + 4], number, module)[2]
                    for at in range(0, len(tokens), 4)
                ]
            )
        stream = torch.cat(after)


def _through(ours: Layers, student: Any, tokens: Any, hidden: Any, number: int, module: nn.Module) -> tuple[Any, ...]:
    """Input and output of the student's MLP, and the stream after its layer."""
    seen: list[Any] = []
    handle = module.register_forward_hook(lambda _, args, output: seen.extend((args[0], output)))
    _, out = ours.run(_decoder(student, tokens), hidden, number, number + 1)
    handle.remove()
    return (*seen, out)


def _fit(module: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> None:
    optimizer = torch.optim.AdamW(module.parameters(), REFINE_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    scale = targets.flatten(0, 1).square().sum(-1).median()  # a few tokens are hundreds of times larger
    generator = torch.Generator().manual_seed(0)
    num_steps = REFINE_EPOCHS * len(inputs) // 2
    step = 0
    for _ in range(REFINE_EPOCHS):
        for rows in torch.randperm(len(inputs), generator=generator).split(2):
            difference = (module(inputs[rows]) - targets[rows]).square().sum(-1)
            weight = (4 * scale / targets[rows].square().sum(-1).clamp_min(1e-9)).clamp_max(1.0)
            for group in optimizer.param_groups:
                group["lr"] = REFINE_RATE * 0.5 * (1 + math.cos(math.pi * step / num_steps))
            optimizer.zero_grad()
            (weight * difference / scale).mean().backward()
            optimizer.step()
            step += 1
    module.requires_grad_(True)
    optimizer.zero_grad()


def _decoder(model: Any, tokens: torch.Tensor) -> Callable[[], Any]:
    return lambda: model.get_decoder()(input_ids=tokens, use_cache=False)


def _two_rounds(setup: Setup, start: Any, rate: float, dense: Any, penalised: bool) -> dict[str, Any]:
    with patch("sparsekd.distillation.worker.Objective", WithNextCut) if penalised else contextlib.nullcontext():
        first = train(setup, start, rate, num_blocks=BLOCKS)
    result: dict[str, Any] = {"round 1": ratios(setup.measure(first), dense)}
    compression.compress(first, torch.cat(setup.batches)[:64], reduction=NEXT, method="whitened", format="pivot")
    result["cut"] = ratios(setup.measure(first), dense)
    result["round 2"] = ratios(setup.measure(train(setup, first, rate, num_blocks=BLOCKS // 2)), dense)
    return result


class WithNextCut(Objective):
    """Adds, in the last tenth, the share of every compressed layer's output energy that the next cut would lose."""

    def __init__(self, student: Any, options: Any, *rest: Any):
        super().__init__(student, options, *rest)
        self.left = BLOCKS * 9 // 10 // options.micro_batch_size  # micro batches until it counts
        self.batch_size, self.shares = options.batch_size, []
        self.ranks = {
            n: rank_for(m.in_features, m.out_features, (1 - NEXT) * m.in_features * m.out_features, "pivot")
            for n, m in student.named_modules()
            if isinstance(m, CompressedLinear)
        }

    def forward(self, batch: Any, denominator: int) -> Any:
        if not torch.is_grad_enabled():
            return super().forward(batch, denominator)
        self.left -= 1
        if self.left >= 0:
            return super().forward(batch, denominator)
        self.shares.clear()
        handles = [self.student.get_submodule(n).register_forward_hook(self._reads(n)) for n in self.ranks]
        outcome = super().forward(batch, denominator)
        for handle in handles:
            handle.remove()
        part = len(batch.tokens) / self.batch_size
        return outcome._replace(total=outcome.total + PENALTY * part * torch.stack(self.shares).mean())

    def _reads(self, name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: torch.Tensor) -> None:
            if self.ranks[name] >= module.rank:
                return
            up, down = module.factors()
            with torch.no_grad():
                basis, triangle = torch.linalg.qr(up.detach())
                gram = Gram(module.rank)
                gram.add(args[0].flatten(0, -2) @ down.detach().T)
                middle = triangle.double() @ gram.mean() @ triangle.double().T
                kept = basis @ torch.linalg.eigh(middle)[1].float()[:, -self.ranks[name] :]
            y = output.flatten(0, -2)
            size = y.square().sum(-1)
            weight = (4 * size.median() / size).clamp_max(1.0).detach()  # as the statistics cap it
            lost = (weight * (y - (y @ kept) @ kept.T).square().sum(-1)).sum()
            self.shares.append(lost / (weight * size).sum().detach())

        return hook


if __name__ == "__main__":
    main()
