"""Which distillation loss ends nearer to the dense model: modes and temperatures after equal training.

    python benchmarks/loss_modes.py DATA [--seeds 42 123 456] [--temperatures 1 2 3] [--modes bucket ...] [--rate 1e-4]

Every arm starts from the same truncated model (35 %, `two-sided, no probe` of truncation_ablation.py), and sees the
same 60,160 tokens once, in the order of the seed, with alpha 0.5 and one learning rate. Measured are, on 4,096 tokens
of WikiText-2 test and of held-out C4, the strict perplexity as a ratio to the dense model's, and the KL of the dense
model's distributions to the arm's, over the whole vocabulary, in nats a token.

`tempered tail` is a bucket that is tempered along with the kept tokens, r^(1/T) for the tail's mass r: common
elsewhere, not in the product. At temperature 1 it is `bucket`, so it is not run there.

An arm that benchmarks/results/loss_modes.json holds already is not run again: kill it and go on at any time. Two of
these with other seeds or temperatures may run side by side, with OMP_NUM_THREADS=1 faster than one with two threads.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
from typing import Any
from unittest.mock import patch

import torch
from _record import RESULTS, record
from torch import Tensor
from truncation_ablation import TEST_TOKENS, Setup, prepare, train, truncated

from sparsekd import losses
from sparsekd.evaluate import measure, ratio

NAME, REDUCTION, BLOCKS = "loss_modes", 0.35, 235
TEMPERED_TAIL = "tempered tail"
MODES = ("bucket", "paper", "renorm_full", TEMPERED_TAIL)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 123, 456])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 2.0, 3.0])
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--rate", type=float, default=1e-4)
    given = parser.parse_args()
    setup = prepare(given.data, train=True, training_blocks=BLOCKS)
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
        arm, part = f"{mode}, T {temperature:g}", f"seed {seed}, rate {given.rate:g}"
        if part in recorded().get(arm, {}) or (mode == TEMPERED_TAIL and temperature == 1):
            continue
        distill = dataclasses.replace(
            setup.recipe.distill, loss="bucket" if mode == TEMPERED_TAIL else mode, temperature=temperature
        )
        chosen = dataclasses.replace(setup, recipe=dataclasses.replace(setup.recipe, distill=distill))
        changed = patch.dict(losses._KD, {"bucket": tempered_tail})
        with changed if mode == TEMPERED_TAIL else contextlib.nullcontext():
            save(arm, part, train(chosen, start, given.rate, seed, BLOCKS))


def recorded() -> dict[str, Any]:
    path = RESULTS / f"{NAME}.json"
    return json.loads(path.read_text())["arms"] if path.exists() else {}


def beside_dense(setup: Setup, model: Any) -> dict[str, dict[str, tuple[float, float]]]:
    """Ratio of perplexities and KL by text, each with its standard error."""
    found: dict[str, dict[str, tuple[float, float]]] = {"perplexity": {}, "kl": {}}
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
