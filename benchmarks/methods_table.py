"""The tables of docs/experiments/methods.md from the rows of an experiment `methods`.

    python benchmarks/methods_table.py RUN [--seed 42]

First every method at every reduction, then for each reduction what an arm weighs, how fast it is and each text, and in
how many texts each claim of the paper holds. All perplexities are divided by the dense model's; means over texts are
geometric.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import _tables
from reproduce_summary import markdown

from sparsekd.recipe import method_names
from sparsekd.report.tables import Titled
from sparsekd.reproduce.arms import DENSE_KD

OF_THE_RECIPE = "one-shot"  # the arm at 10.32 % beside the paper's tiers, whose method is the recipe's, two-sided
TEXTS = ("wikitext2", "c4", "gsm8k", "code", "stories")


@dataclass(frozen=True)
class Arm:
    """A finished arm: its row among the trained, and its ratios by stage and text."""

    row: _tables.Row
    ratios: dict[str, dict[str, float]]

    @property
    def method(self) -> str:
        return re.sub(r"-[\d.]+$", "", self.row["arm"])

    @property
    def name(self) -> str:
        name = "two-sided" if self.method == OF_THE_RECIPE else self.method
        return f"`{name}`" if name in method_names() else name.replace("-", " ") if self.reduction else name

    @property
    def reduction(self) -> str:
        """As the arm's name has it; nothing of those that prune nothing."""
        return self.row["arm"].removeprefix(self.method).removeprefix("-")

    def mean(self, stage: str) -> float | None:
        ratios = self.ratios.get(stage)
        return math.exp(statistics.fmean(map(math.log, ratios.values()))) if ratios else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--seed", type=int, default=42)
    given = parser.parse_args()
    arms = arms_of(given.run, given.seed)
    control = next((arm for arm in arms if arm.row["arm"] == DENSE_KD), None)
    if control is None:
        parser.error(f"run {given.run} has no arm {DENSE_KD} of seed {given.seed}: expected one of experiment methods")
    reductions = sorted({arm.reduction for arm in arms} - {""}, key=float)
    print("\n".join(markdown(overview(arms, reductions))))
    for reduction in reductions:
        print("\n".join(markdown(details([arm for arm in arms if arm.reduction == reduction], control, reduction))))
    others = [arm for arm in arms if not arm.reduction]
    print("\n".join(markdown(details(others, control, ""))))
    print("\n".join(markdown(verdicts(given.run))))


def arms_of(run: str, seed: int) -> list[Arm]:
    """Those that were measured."""
    measured: dict[str, dict[str, dict[str, float]]] = {}
    for row in _tables.read("measured", run=run, seed=seed):
        measured.setdefault(row["arm"], {}).setdefault(row["stage"], {})[row["text"]] = row["to_dense"]
    trained = {row["arm"]: row for row in _tables.read("trained", run=run, seed=seed)}
    return [Arm(trained[name], ratios) for name, ratios in measured.items()]


def overview(arms: Sequence[Arm], reductions: Sequence[str]) -> Titled:
    """A row a method that was tried at several reductions."""
    by_place = {(arm.method, arm.reduction): arm for arm in arms}
    several = dict.fromkeys(m for m, _ in by_place if sum((m, r) in by_place for r in reductions) > 1)

    def order(method: str) -> float:
        ratios = [by_place[method, r].mean("distilled") for r in reductions if (method, r) in by_place]
        return statistics.fmean(math.log(ratio) for ratio in ratios if ratio)

    tried = [r for r in reductions if sum((m, r) in by_place for m in several) > 1]
    rows = []
    for method in sorted(several, key=order):
        found = [by_place.get((method, r)) for r in tried]
        rows.append(
            [
                f"`{method}`",
                *(f"{shown(a.mean('compressed'))}, {shown(a.mean('distilled'))}" if a else "" for a in found),
            ]
        )
    return Titled("Perplexity to dense before, after training", ["method", *(f"{r} %" for r in tried)], rows)


def details(arms: Iterable[Arm], control: Arm, reduction: str) -> Titled:
    header = ["method", "MLPs, model removed", "MB", "prefill", "rate", "before", "after", "after, to Dense+KD"]
    header += [" / ".join(TEXTS) + ", after", "opens in"]
    rows = []
    for arm in sorted(arms, key=lambda arm: arm.mean("distilled") or 0.0):
        row, after = arm.row, arm.ratios["distilled"]
        seconds = row["prefill"]["seconds"]
        rows.append(
            [
                arm.name,
                f"{row['mlp_reduction']:.1%}, {row.get('model_reduction', 0.0):.1%}",
                f"{row['bytes'] / 1e6:.0f}",
                f"{seconds['dense'] / seconds['distilled']:.2f} x",
                f"{row['learning_rate']:g}",
                shown(arm.mean("compressed")),
                shown(arm.mean("distilled")),
                shown((arm.mean("distilled") or 0.0) / (control.mean("distilled") or 1.0)),
                " / ".join(shown(after[text]) for text in TEXTS),
                ", ".join(row["opens_in"]),
            ]
        )
    return Titled(f"At {reduction} %" if reduction else "Nothing removed", header, rows)


def verdicts(run: str) -> Titled:
    """Each claim of the paper's tables V, VI and IX, and in how many of the texts it holds."""
    counts: dict[tuple[str, str], dict[str, int]] = {}
    for row in _tables.read("comparisons", run=run, experiment="methods"):
        key = row["claim"], row["model"].replace(", distilled", "").replace(", compressed", ", not trained")
        counted = counts.setdefault(key, dict.fromkeys(("holds", "not decided", "does not hold"), 0))
        counted[row["verdict"]] += 1
    rows = [[claim, model, *map(str, counted.values())] for (claim, model), counted in counts.items()]
    claims = list(dict.fromkeys(claim for claim, _ in counts))
    rows.sort(key=lambda row: (claims.index(row[0]), row[1]))
    kept = [row for row in rows if not row[0].startswith("distillation brings quality back")]
    return Titled("Claims", ["claim", "model", "holds", "not decided", "does not hold"], kept)


def shown(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.2f}"


if __name__ == "__main__":
    main()
