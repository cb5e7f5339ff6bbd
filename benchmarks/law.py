"""One law for the loss after pruning and training, fitted to all recorded arms of a method together.

    python benchmarks/law.py METHOD=RUN/ARM[/CONTROL] ...      e.g. neurons=teaching-61440/plain-35/plain-dense

The arms are rows of benchmarks/results/models/trained.jsonl, of all their seeds; CONTROL is the run's arm that trains
the dense model, by default Dense+KD. The law is P^2 (arXiv 2411.10272), of one model size, where what depends on the
size is a constant:

    gap = reduction^gamma * (E + B / tokens^beta)

`gap` is the cross-entropy on the validation blocks, in nats a token, less the least that the control comes to in the
same run with the same seed; P^2 subtracts the unpruned model's instead, which has learned nothing from the new text. It
is fitted twice: to the ends of the trainings, where the learning rate has come to its least, and to all validations
after the first fifth, as P^2's authors do. The least squares of relative errors are looked for on a grid of gamma and
beta; E and B are not negative. Arms of one run and name, which differ by their seeds, are predicted from the others:
that is the law's error. `law.json` has all of it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import _tables
import numpy as np
from _record import record

from sparsekd.reproduce import RECOVERED
from sparsekd.reproduce.arms import DENSE_KD

NUM_POINTS = 5  # that a fit of four constants needs at least, of two reductions and two budgets
WARM = 0.2  # of a training, in which its rate rises
BUDGETS = (1.2e6, 20e6, 1e9)
REDUCTIONS = (0.15, 0.35, 0.65)
Point = tuple[float, float, float]  # reduction, tokens, gap


@dataclass(frozen=True)
class Law:
    """`reduction^gamma * (floor + scale / tokens^beta)`, and the root mean square of its relative errors."""

    gamma: float
    floor: float
    scale: float
    beta: float
    error: float

    def gap(self, reduction: float, tokens: float) -> float:
        return reduction**self.gamma * (self.floor + self.scale * tokens**-self.beta)

    def tokens_for(self, reduction: float, gap: float) -> float | None:
        """Tokens until the gap is as small; None if it never is."""
        left = gap / reduction**self.gamma - self.floor
        return (self.scale / left) ** (1 / self.beta) if left > 0 else None


@dataclass(frozen=True)
class Arm:
    """One training: its points, the last of which has its whole budget."""

    name: str
    seed: int
    points: list[Point]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="+", metavar="METHOD=RUN/ARM[/CONTROL]")
    given = parser.parse_args()
    by_method: dict[str, list[Arm]] = {}
    try:
        for word in given.arms:
            method, _, place = word.partition("=")
            by_method.setdefault(method, []).extend(arms_of(*place.split("/", 2)))
        laws = {
            method: {"ends": described(arms, True), "validations": described(arms, False)}
            for method, arms in by_method.items()
        }
    except ValueError as error:
        parser.error(str(error))
    record("law", {"laws": laws})


def arms_of(run: str, arm: str = "", control: str = DENSE_KD) -> list[Arm]:
    """Of all seeds that have a control; raises `ValueError` where there are none."""
    goals = {
        row["seed"]: min(one["ce"] for one in row["validations"])
        for row in _tables.read("trained", run=run, arm=_tables.folder_of(control))
    }
    found = []
    for row in _tables.read("trained", run=run, arm=arm):
        if row["seed"] in goals and row.get("validations"):
            last = row["validations"][-1]["tokens"]
            points = [
                (row["mlp_reduction"], one["tokens"], one["ce"] - goals[row["seed"]])
                for one in row["validations"]
                if one["tokens"] >= WARM * last and one["tokens"] > 0
            ]
            found.append(Arm(f"{run}/{arm}", row["seed"], points))
    if not found:
        raise ValueError(f"{run}/{arm}: no training with a {control} of its seed in results/models/trained.jsonl")
    return found


def fit(points: Sequence[Point]) -> Law:
    """Raises `ValueError` where there are too few points, and for a gap that is not above zero: no law is below it."""
    reduction, tokens, gap = np.array(points).T
    counts = len(points), len(set(reduction.round(2))), len(set(tokens))
    if counts[0] < NUM_POINTS or min(counts[1:]) < 2:
        raise ValueError(
            f"{counts[0]} points of {counts[1]} reductions and {counts[2]} budgets are too few for four constants: "
            f"expected at least {NUM_POINTS} of 2 and 2: name more arms"
        )
    if (below := gap <= 0).any():
        raise ValueError(f"a gap of {gap[below][0]:.3f} nats is not above zero: leave out arms that reach {DENSE_KD}")
    best: Law | None = None
    for gamma in np.linspace(0.2, 4.0, 77):
        size = reduction**gamma / gap
        for beta in np.linspace(0.02, 1.0, 99):
            floor, scale = _not_negative(size, size * tokens**-beta)
            error = float(np.sqrt(np.mean((floor * size + scale * size * tokens**-beta - 1) ** 2)))
            if best is None or error < best.error:
                best = Law(float(gamma), floor, scale, float(beta), error)
    assert best is not None
    return best


def _not_negative(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Of x a + y b = 1 by least squares, x and y not below zero."""
    aa, ab, bb, a1, b1 = a @ a, a @ b, b @ b, a.sum(), b.sum()
    determinant = aa * bb - ab * ab
    if determinant > 1e-12 * aa * bb:
        x, y = (a1 * bb - b1 * ab) / determinant, (b1 * aa - a1 * ab) / determinant
        if x >= 0 and y >= 0:
            return float(x), float(y)
    alone = [(float(a1 / aa), 0.0), (0.0, float(b1 / bb))]
    return min(alone, key=lambda xy: float(np.sum((xy[0] * a + xy[1] * b - 1) ** 2)))


def described(arms: Sequence[Arm], of_ends: bool) -> dict[str, Any]:
    """The law, how well it predicts each arm from the others, and what it says of budgets that were not run."""

    def points(chosen: Sequence[Arm]) -> list[Point]:
        return [point for arm in chosen for point in (arm.points[-1:] if of_ends else arm.points)]

    law, ends = fit(points(arms)), []
    others: dict[str, Law | None] = {}
    for name in dict.fromkeys(arm.name for arm in arms):
        try:
            others[name] = fit(points([arm for arm in arms if arm.name != name]))
        except ValueError:  # too few are left
            others[name] = None
    for arm in arms:
        reduction, tokens, gap = arm.points[-1]
        without = others[arm.name]
        row = {"arm": arm.name, "seed": arm.seed, "reduction": reduction, "tokens": tokens, "gap": gap}
        predicted = without.gap(reduction, tokens) if without else None
        ends.append(row | {"fitted": law.gap(reduction, tokens), "predicted": predicted})
    errors = [abs(math.log(row["predicted"] / row["gap"])) for row in ends if row["predicted"]]

    def to_control(r: float, n: float) -> list[float]:
        """By the law, and the least and the most by the laws that were fitted without one of the arms."""
        found = [math.exp(one.gap(r, n)) for one in (law, *others.values()) if one]
        return [round(ratio, 4) for ratio in (found[0], min(found), max(found))]

    return {
        "law": asdict(law),
        "ends": ends,
        "error_left_out": math.expm1(float(np.mean(errors))) if errors else None,
        "to_dense_kd": {f"{r:g}": {f"{n:.2g}": to_control(r, n) for n in BUDGETS} for r in REDUCTIONS},
        "tokens_for": {
            f"{goal:g} at {r:g}": law.tokens_for(r, math.log(goal))
            for r, goal in zip(REDUCTIONS, RECOVERED, strict=True)
        },
    }


if __name__ == "__main__":
    main()
