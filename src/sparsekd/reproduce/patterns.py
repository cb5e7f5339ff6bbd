"""What the paper claims, each as a comparison that can fail, with its numbers beside ours.

A pattern is a ratio of two perplexities and a bound. It holds, or does not, when the whole interval is on one side of
the bound; otherwise, and where the interval is unknown, it is not decided.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from sparsekd.recipe import method_names
from sparsekd.reproduce.arms import BORN_AGAIN, DENSE_KD, EQUAL_TOKENS, ONE_SHOT, Seed, arm, percent, rounds
from sparsekd.reproduce.spread import Comparison

DENSE, PRUNED, DISTILLED = "dense", "compressed", "distilled"


@dataclass(frozen=True)
class Model:
    """A model of the experiment: an arm before or after its training; the dense model is of no arm."""

    stage: Literal["dense", "compressed", "distilled"]
    arm: str | None = None

    def __str__(self) -> str:
        return self.stage if self.arm is None else f"{self.arm}, {self.stage}"


@dataclass(frozen=True)
class Pattern:
    """`model`'s perplexity over `reference`'s is claimed to be below, or above, `bound`."""

    claim: str
    model: Model
    reference: Model
    side: Literal["below", "above"]
    bound: float = 1.0


def dense() -> Model:
    """The model as it comes."""
    return Model(DENSE)


def pruned(arm: str) -> Model:
    """The arm's model before its training."""
    return Model(PRUNED, arm)


def distilled(arm: str) -> Model:
    """The arm's model after its training."""
    return Model(DISTILLED, arm)


# Perplexities of the paper's tables, of Qwen3-0.6B and (VI) Phi-4-mini: the dense model's, then before and after
# distillation by arm.
_PAPER: dict[str, tuple[float, dict[str, tuple[float | None, float]]]] = {
    "II": (35.87, {"round 35%": (None, 24.92)}),
    "III": (
        35.87,
        {
            DENSE_KD: (None, 21.80),
            "round 15%": (682, 21.06),
            "round 35%": (39.97, 24.92),
            "round 51%": (None, 29.99),
            "round 65%": (47.34, 29.07),
        },
    ),
    "IV": (35.87, {DENSE_KD: (None, 21.80), "round 65%": (None, 35.57), "round 65% better teacher": (None, 32.91)}),
    "V": (26.12, {"WANDA 15%": (1909, 19.46), "WANDA 35%": (538_627, 25.72), "WANDA 65%": (681_606, 36.31)}),
    "VI": (17.53, {DENSE_KD: (None, 12.69), "tiered SVD 10.32%": (48.49, 7.54)}),
}
_PAPER["methods"] = 26.12, {name.replace("WANDA", "wanda"): found for name, found in _PAPER["V"][1].items()}
# of its Table IX: recovery is strong within 5 % of the baseline, moderate within 15 %, and what can exceed it is more
_RECOVERY: dict[str, tuple[str, Literal["below", "above"], float]] = {
    "sparsegpt": ("SparseGPT recovers strongly (within 5 % of dense)", "below", 1.05),
    "wanda": ("Wanda recovers moderately (within 15 %)", "below", 1.15),
    "magnitude": ("magnitude pruning recovers weakly (not within 15 %)", "above", 1.15),
    "taylor": ("LLM-Pruner recovers moderately (within 15 %)", "below", 1.15),
    "shortgpt": ("ShortGPT recovers moderately (within 15 %)", "below", 1.15),
    "slicegpt": ("SliceGPT recovers moderately (within 15 %)", "below", 1.15),
    "neurons": ("SparseKD, by neurons, can exceed dense", "below", 1.0),
    "two-sided": ("SparseKD, by low rank, can exceed dense", "below", 1.0),
}


def paper(experiment: str, model: Model) -> float | None:
    """The paper's perplexity of a model over the dense one's; None where it gives none."""
    if model.arm is None:
        return 1.0
    of_dense, arms = _PAPER.get(experiment, (1.0, {}))
    before, after = arms.get(model.arm, (None, None))
    found = before if model.stage == PRUNED else after
    return None if found is None else found / of_dense


def _rounds(seed: Seed) -> list[Pattern]:
    names = [f"round {percent(reduction)}" for reduction in seed.reductions]
    first, last = names[0], names[-1]
    falls = "quality falls with every further reduction"
    as_long = "... and below the dense model distilled on as many tokens as all rounds"
    controls = [distilled(EQUAL_TOKENS)] if EQUAL_TOKENS in rounds(seed) else []
    return [
        Pattern(
            "distilling the dense model with its own distribution improves it", distilled(DENSE_KD), dense(), "below"
        ),
        Pattern("pruning alone more than doubles the perplexity", pruned(first), dense(), "above", 2.0),
        *(Pattern("distillation brings quality back", distilled(name), pruned(name), "below") for name in names),
        *(Pattern(falls, distilled(higher), distilled(lower), "above") for lower, higher in pairwise(names)),
        Pattern("the first round ends below the dense model distilled", distilled(first), distilled(DENSE_KD), "below"),
        Pattern("even the last round ends below the dense model", distilled(last), dense(), "below"),
        *(Pattern(as_long, distilled(last), control, "below") for control in controls),
    ]


def _teachers(seed: Seed) -> list[Pattern]:
    last = f"round {percent(seed.reductions[-1])}"
    swapped = distilled(f"{last} better teacher")
    return [Pattern("a better teacher makes a better student", swapped, distilled(last), "below")]


def _destroyed_and_restored(name: str) -> list[Pattern]:
    return [
        Pattern("pruning alone destroys it (ten times the perplexity)", pruned(name), dense(), "above", 10.0),
        Pattern("distillation brings quality back", distilled(name), pruned(name), "below"),
        Pattern("... to the dense model's", distilled(name), dense(), "below"),
    ]


def _tiered(_: Seed) -> list[Pattern]:
    name = "tiered SVD 10.32%"
    return [
        Pattern("a mild tiered cut alone hurts", pruned(name), dense(), "above"),
        Pattern("pruned and distilled, it ends below the dense model", distilled(name), dense(), "below"),
        Pattern("... and below the dense model distilled", distilled(name), distilled(DENSE_KD), "below"),
        Pattern("the recipe's own cut ends lower", distilled("one shot 10.32%"), distilled(name), "below"),
    ]


def _controls(seed: Seed) -> list[Pattern]:
    shot = f"one shot {percent(seed.control_reduction)}"
    return [
        Pattern("distilling the dense model improves it", distilled(DENSE_KD), dense(), "below"),
        Pattern("... and so does cross-entropy alone", distilled("dense CE"), dense(), "below"),
        Pattern("... and so do its own probabilities alone, at T = 2", distilled("dense KL T2"), dense(), "below"),
        Pattern("... and at T = 1", distilled("dense KL T1"), dense(), "below"),
        Pattern("its own probabilities help beside cross-entropy", distilled(DENSE_KD), distilled("dense CE"), "below"),
        Pattern("they help the pruned model beside cross-entropy", distilled(shot), distilled("pruned CE"), "below"),
        Pattern("cross-entropy helps it beside them", distilled(shot), distilled("pruned KL"), "below"),
    ]


def _methods(seed: Seed) -> list[Pattern]:
    """The claim itself, of every arm; then the paper's Tables V, VI and IX."""
    back = "distillation brings quality back, whatever was removed"
    names = [arm(method, r) for r in seed.one_shot for method in method_names()]
    classes = [
        Pattern(claim, distilled(arm(method, r)), dense(), side, bound)
        for r in seed.one_shot
        for method, (claim, side, bound) in _RECOVERY.items()
    ]
    born_again = "Born-Again recovers moderately (within 15 %)"
    classes.append(Pattern(born_again, distilled(BORN_AGAIN), dense(), "below", 1.15))
    masked = [pattern for r in seed.one_shot for pattern in _destroyed_and_restored(arm("wanda", r))]
    return [*(Pattern(back, distilled(n), pruned(n), "below") for n in names), *classes, *masked, *_tiered(seed)]


PATTERNS: dict[str, Callable[[Seed], list[Pattern]]] = {
    "II": _rounds,
    "III": _rounds,
    "IV": _teachers,
    "V": lambda _: [pattern for r in ONE_SHOT for pattern in _destroyed_and_restored(f"WANDA {percent(r)}")],
    "VI": _tiered,
    "methods": _methods,
    "controls": _controls,
    "recovery": lambda _: [],
    "svd": lambda _: [pattern for r in ONE_SHOT for pattern in _destroyed_and_restored(f"SVD {percent(r)}")],
}


def attribution(seed: Seed) -> dict[str, tuple[Model, Model]]:
    """What a change of perplexity is due to: the two models of `controls` that differ in just that."""
    shot = f"one shot {percent(seed.control_reduction)}"
    return {
        "the data (cross-entropy on the corpus)": (distilled("dense CE"), dense()),
        "its own probabilities, T = 1 (zero gradient at the start) and the cache": (distilled("dense KL T1"), dense()),
        "temperature (T = 2 for T = 1)": (distilled("dense KL T2"), distilled("dense KL T1")),
        "a teacher cut to its top-k": (distilled("dense KL T1 top-k only"), distilled("dense KL T1")),
        "probabilities beside cross-entropy": (distilled(DENSE_KD), distilled("dense CE")),
        "pruning, before training": (pruned(shot), dense()),
        "pruning, after training": (distilled(shot), distilled(DENSE_KD)),
        "training the pruned model": (distilled(shot), pruned(shot)),
        "... by cross-entropy only": (distilled("pruned CE"), pruned(shot)),
        "... by probabilities only": (distilled("pruned KL"), pruned(shot)),
    }


def verdict(comparison: Comparison, pattern: Pattern) -> str:
    """`holds`, `does not hold`, or `not decided` where the interval is unknown or reaches over the bound; on it is not
    beyond it."""
    if comparison.interval is None:
        return "not decided"
    low, high = comparison.interval
    below = pattern.side == "below"
    if high < pattern.bound if below else low > pattern.bound:
        return "holds"
    return "does not hold" if (low >= pattern.bound if below else high <= pattern.bound) else "not decided"
