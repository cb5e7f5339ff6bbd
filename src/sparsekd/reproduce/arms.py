"""The arms of each experiment: which rounds to run, from which start, with which objective and teacher.

An arm changes one thing. It lies in `arms/<arm>/seed-<seed>/` of the run directory; what arms share (the teacher's
cache, a pruned model) is made once and named by all of them, whatever experiment they belong to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sparsekd.recipe import Compress, RateScale, Recipe, method_named, method_names
from sparsekd.run import ARMS, SHARED_CACHE, Place, Round, split

DENSE_KD = "Dense+KD"
BORN_AGAIN = "Born-Again"  # the dense model's architecture, with fresh weights
EQUAL_TOKENS = "Dense+KD equal tokens"  # as many as all rounds together
REDUCTIONS = (0.15, 0.35, 0.51, 0.65)  # of the paper's rounds 1, 4, 6 and 8
ONE_SHOT = (0.15, 0.35, 0.65)  # of the plain truncation and of the paper's Table V
TIERED = 0.1032  # of the paper's Table VI
TIMED = (0.35, 0.65)  # of the paper's Tables VII and VIII; X has the larger


def percent(reduction: float) -> str:
    """As it stands in the names of arms."""
    return f"{100 * reduction:.4g}%"


class Seed:
    """Makes the rounds of one seed."""

    def __init__(self, recipe: Recipe, seed: int, methods: Sequence[str] | None = None):
        self._recipe, self._seed = recipe, seed
        self.methods = method_names() if methods is None else methods  # of experiment `methods`
        self.has_others = methods is None  # it has those of the paper's tables too that are no method of ours
        self.reductions = recipe.rounds or list(REDUCTIONS)
        self.one_shot = recipe.rounds or list(ONE_SHOT)  # of experiment `methods`
        self.splits_corpus = recipe.split_corpus
        self.epochs = recipe.distill.epochs
        self.control_reduction = min(self.reductions, key=lambda reduction: abs(reduction - 0.35))

    def dense(self, name: str, **distill: Any) -> Round:
        """The dense model distilled without pruning, with some of the recipe's training changed."""
        model, options = self._recipe.model.name, replace(self._recipe.distill, **distill)
        teachers: dict[Place, float] = {model: 1.0}
        return Round(self._folder(name), self._seed, model, None, None, options, teachers, SHARED_CACHE)

    @property
    def svd(self) -> Compress:
        """The paper's truncation, each weight by itself, at the same budget."""
        return self.compress.by("svd", format="lowrank", allocation="uniform", probe_tokens=0)

    @property
    def compress(self) -> Compress:
        """The recipe's structural step."""
        return self._recipe.compress

    def pruned(
        self, name: str, reduction: float, start: Place | None = None, compress: Compress | None = None
    ) -> Round:
        """The dense model, or what an earlier round left, pruned by the recipe's method or that of `compress`, and
        distilled."""
        options = replace(compress or self.compress, reduction=reduction)
        folder = Path(self._folder(name)) / "compressed"
        round_ = replace(self.dense(name), compress=options, compressed=folder)
        return round_ if start is None else replace(round_, start=start)

    def trained(self, name: str, like: Round, **distill: Any) -> Round:
        """The same pruned model, trained otherwise."""
        return replace(like, name=self._folder(name), distill=replace(like.distill, **distill))

    def taught(self, name: str, like: Round, teacher: Round) -> Round:
        """The same pruned model and training, another teacher."""
        place = teacher.distilled
        return replace(like, name=self._folder(name), teachers={place: 1.0}, cache=f"{teacher.name}/cache")

    def _folder(self, name: str) -> str:
        return f"{ARMS}/{name.replace(' ', '-').replace('%', '')}/seed-{self._seed}"


def rounds(seed: Seed) -> dict[str, Round]:
    """Rounds of pruning, each from the result of the one before, and the controls without pruning: with the tokens of
    one round, and with those that the last round's model has been trained on in all."""
    made: list[Round] = []
    names = [f"round {percent(reduction)}" for reduction in seed.reductions]
    for name, reduction in zip(names, seed.reductions, strict=True):
        made.append(seed.pruned(name, reduction, made[-1].distilled if made else None))
    controls = {DENSE_KD: seed.dense(DENSE_KD)}
    if seed.splits_corpus:  # the control keeps all of it: what the last round's model has learned from in the end
        made = split(made)
    elif len(made) > 1:
        controls[EQUAL_TOKENS] = seed.dense(EQUAL_TOKENS, epochs=len(made) * seed.epochs)
    return controls | dict(zip(names, made, strict=True))


def better_teacher(seed: Seed) -> dict[str, Round]:
    """The last round again, taught by the distilled dense model."""
    made = rounds(seed)
    name, last = list(made.items())[-1]
    return made | {f"{name} better teacher": seed.taught(f"{name} better teacher", last, made[DENSE_KD])}


def wanda(seed: Seed) -> dict[str, Round]:
    """Unstructured pruning by WANDA."""
    masked = seed.compress.by("wanda")
    return {name: seed.pruned(name, r, compress=masked) for r in ONE_SHOT for name in [f"WANDA {percent(r)}"]}


def tiered(seed: Seed) -> dict[str, Round]:
    """A mild cut by the paper's tiers, and the recipe's own method at the same reduction."""
    tiers = seed.compress.by("svd", format="lowrank", allocation="energy", probe_tokens=0)
    return {
        DENSE_KD: seed.dense(DENSE_KD),
        "tiered SVD 10.32%": seed.pruned("tiered SVD 10.32%", TIERED, compress=tiers),
        "one shot 10.32%": seed.pruned("one shot 10.32%", TIERED),
    }


def svd(seed: Seed) -> dict[str, Round]:
    """The paper's truncation, each weight by itself, at the same budget."""
    return {name: seed.pruned(name, r, compress=seed.svd) for r in ONE_SHOT for name in [f"SVD {percent(r)}"]}


def arm(method: str, reduction: float) -> str:
    """The name of an arm of experiment `methods`."""
    return f"{method} {percent(reduction)}"


def methods(seed: Seed) -> dict[str, Round]:
    """The dense model distilled, each method at each reduction, and where no methods were chosen a Born-Again student
    and the paper's mild cut.

    `svd` is the paper's truncation; the others have the options of the recipe's sections. `distill.lr_scale` is for low
    rank, whose factors multiply each other's changes: the other forms train their weights alike, but for those that the
    recipe freezes.
    """
    found = {DENSE_KD: seed.dense(DENSE_KD)}
    scales = asdict(found[DENSE_KD].distill.lr_scale)  # the recipe's
    alike = RateScale(**{part: float(scale > 0) for part, scale in scales.items()})
    for reduction in seed.one_shot:
        for method in seed.methods:
            chosen = seed.svd if method == "svd" else seed.compress.by(method)
            made = seed.pruned(arm(method, reduction), reduction, compress=chosen)
            if method_named(method).FORM != "lowrank":
                made = replace(made, distill=replace(made.distill, lr_scale=alike))
            found[arm(method, reduction)] = made
    if not seed.has_others:
        return found
    found[BORN_AGAIN] = seed.dense(BORN_AGAIN, start="fresh", lr_scale=RateScale())
    return found | tiered(seed)


def cuts(seed: Seed, reductions: Sequence[float] = TIMED) -> dict[str, Round]:
    """The recipe's cut, of which only the speed is asked for: what is trained is as fast."""
    return {name: seed.pruned(name, r) for r in reductions for name in [f"one shot {percent(r)}"]}


def controls(seed: Seed) -> dict[str, Round]:
    """What of the change is due to the data, the temperature, the truncated teacher, and the cache itself."""
    reduction = seed.control_reduction
    pruned = seed.pruned(f"one shot {percent(reduction)}", reduction)
    return {
        DENSE_KD: seed.dense(DENSE_KD),
        "dense CE": seed.dense("dense CE", alpha=0.0),
        "dense KL T1": seed.dense("dense KL T1", alpha=1.0, temperature=1.0),
        "dense KL T2": seed.dense("dense KL T2", alpha=1.0, temperature=2.0),
        "dense KL T1 top-k only": seed.dense("dense KL T1 top-k only", alpha=1.0, temperature=1.0, loss="renorm_full"),
        f"one shot {percent(reduction)}": pruned,
        "pruned CE": seed.trained("pruned CE", pruned, alpha=0.0),
        "pruned KL": seed.trained("pruned KL", pruned, alpha=1.0),
    }


def recovery(seed: Seed) -> dict[str, Round]:
    """One long training, and its control: what the recovery curve is fitted to."""
    name = f"one shot {percent(seed.control_reduction)}"
    return {DENSE_KD: seed.dense(DENSE_KD), name: seed.pruned(name, seed.control_reduction)}


EXPERIMENTS: dict[str, Callable[[Seed], dict[str, Round]]] = {
    "II": rounds,  # the same models, by two protocols
    "III": rounds,
    "IV": better_teacher,
    "V": wanda,
    "VI": tiered,
    "VII": cuts,
    "VIII": cuts,
    "X": lambda seed: cuts(seed, TIMED[1:]),
    "methods": methods,
    "controls": controls,
    "recovery": recovery,
    "svd": svd,
}
