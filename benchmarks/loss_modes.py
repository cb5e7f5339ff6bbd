"""Which distillation loss ends nearer to the dense model: modes, temperatures and weightings after equal training.

    python benchmarks/loss_modes.py DATA [--seeds 42 123 456] [--temperatures 1 2 3] [--modes bucket ...] [--rate 1e-4]
    python benchmarks/loss_modes.py DATA --blocks 64 --temperatures 2 --modes bucket entropy gap domain
    python benchmarks/loss_modes.py --summary     what is recorded, over seeds, each mode in pairs with `bucket`

Every arm starts from the same truncated model (35 %, `two-sided, no probe` of truncation_ablation.py), and sees the
same 60,160 tokens (or --blocks of 256) once, in the order of the seed, with alpha 0.5 and one learning rate. Measured
are, on 4,096 tokens of WikiText-2 test and of held-out C4, the strict perplexity as a ratio to the dense model's, and
the KL of the dense model's distributions to the arm's, over the whole vocabulary, in nats a token.

`tempered tail` is a bucket that is tempered along with the kept tokens, r^(1/T) for the tail's mass r: common
elsewhere, not in the product. At temperature 1 it is `bucket`, so it is not run there.
`entropy`, `gap` and `domain` are `bucket` with that `distill.weighting`.

An arm that benchmarks/results/loss_modes.json holds already is not run again: kill it and go on at any time. Two of
these with other seeds or temperatures may run side by side, with OMP_NUM_THREADS=1 faster than one with two threads.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from _record import RESULTS, record
from torch import Tensor
from truncation_ablation import TEST_TOKENS, Setup, prepare, train, truncated

from sparsekd.distillation import losses
from sparsekd.evaluate import measure, ratio

NAME, REDUCTION, BLOCKS = "loss_modes", 0.35, 235
TEMPERED_TAIL = "tempered tail"
MODES = ("bucket", "paper", "renorm_full", TEMPERED_TAIL)
WEIGHTINGS = ("entropy", "gap", "domain")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", nargs="?")
    parser.add_argument("--summary", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 123, 456])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 2.0, 3.0])
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES + WEIGHTINGS)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    given = parser.parse_args()
    if given.summary:
        print("\n".join(summary_lines(recorded(), trained_by(given.rate, given.blocks))))
        return
    if given.data is None:
        parser.error("DATA is needed, unless --summary is given")
    setup = prepare(given.data, train=True, training_blocks=given.blocks)
    start, _ = truncated(setup, "two-sided, no probe", REDUCTION)

    def save(arm: str, part: str, model: Any) -> None:
        values = beside_dense(setup, model)
        found = recorded()  # again: the one beside may have added to it
        found.setdefault(arm, {})[part] = values
        record(NAME, {"arms": found}, show=False)
        print(arm, part, values, flush=True)

    if "start" not in recorded():
        save("start", "before", start)
    for seed, temperature, mode in itertools.product(given.seeds, given.temperatures, given.modes):
        arm, part = f"{mode}, T {temperature:g}", f"seed {seed}, {trained_by(given.rate, given.blocks)}"
        if part in recorded().get(arm, {}) or (mode == TEMPERED_TAIL and temperature == 1):
            continue
        distill = dataclasses.replace(
            setup.recipe.distill,
            loss=mode if mode in ("paper", "renorm_full") else "bucket",
            temperature=temperature,
            weighting=mode if mode in WEIGHTINGS else None,
        )
        chosen = dataclasses.replace(setup, recipe=dataclasses.replace(setup.recipe, distill=distill))
        changed = patch.dict(losses._KD, {"bucket": tempered_tail})
        with changed if mode == TEMPERED_TAIL else contextlib.nullcontext():
            save(arm, part, train(chosen, start, given.rate, seed, given.blocks))


def trained_by(rate: float, blocks: int) -> str:
    """What an arm's seed is recorded under beside it."""
    return f"rate {rate:g}" if blocks == BLOCKS else f"rate {rate:g}, {blocks} blocks"


def summary_lines(arms: dict[str, Any], training: str) -> Iterator[str]:
    """A table over seeds. `bucket`: mean and sample standard deviation of what was measured. Others: those of the
    difference to `bucket` at the same temperature and seed; above zero, the arm is further from the dense model."""
    figures = list(itertools.product(("perplexity", "kl"), ("wikitext2", "c4")))
    yield "| loss | seeds | " + " | ".join(f"{figure}, {text}" for figure, text in figures) + " |"
    yield "|---|---|" + "---|" * len(figures)
    for arm in sorted(arms.keys() - {"start"}, key=lambda arm: (arm[-1], arm)):
        reference = f"bucket, {arm.partition(', ')[2]}"
        seeds = [part for part in arms[arm] if part.endswith(training) and part in arms[reference]]
        if not seeds:
            continue
        cells = []
        for figure, text in figures:
            found, base = (np.array([arms[a][seed][figure][text][0] for seed in seeds]) for a in (arm, reference))
            cells.append(spread(found) if arm == reference else spread(found - base, sign="+"))
        yield f"| {arm} | {len(seeds)} | " + " | ".join(cells) + " |"


def spread(values: np.ndarray, sign: str = "") -> str:
    return f"{values.mean():{sign}.3f}" + (f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else "")


def recorded() -> dict[str, Any]:
    path = RESULTS / f"{NAME}.json"
    return json.loads(path.read_text())["arms"] if path.exists() else {}


def beside_dense(setup: Setup, model: Any) -> dict[str, dict[str, tuple[float, float | None]]]:
    """Ratio of perplexities and KL by text, each with its standard error."""
    found: dict[str, dict[str, tuple[float, float | None]]] = {"perplexity": {}, "kl": {}}
    for name, text in setup.texts.items():
        both = {"dense": setup.model, "model": model}
        measured = measure(both, setup.tokenizer, text, teacher="dense", max_tokens=TEST_TOKENS)
        agreement = measured["model"].agreement
        assert agreement is not None
        found["perplexity"][name] = ratio(measured["model"].perplexity, measured["dense"].perplexity)
        found["kl"][name] = (agreement.kl.value, agreement.kl.standard_error)
    return found


def tempered_tail(teacher: Any, student: Any, temperature: float) -> Tensor:
    """T^2 KL of kept tokens and tail, each to the power of 1/T and renormalised."""
    p = torch.cat([teacher.log_probs, teacher.log_tail[:, None]], -1)
    q = torch.cat([student.kept - student.log_total[:, None], (student.log_tail - student.log_total)[:, None]], -1)
    soft_p, soft_q = (p / temperature).log_softmax(-1), (q / temperature).log_softmax(-1)
    return temperature**2 * (soft_p.exp() * (soft_p - soft_q)).sum(-1)


if __name__ == "__main__":
    main()
