"""The rounds of a run as data: where each starts, what it removes, who teaches it, and where its results lie.

A run is a list of rounds, each prune -> distil -> evaluate. Ahead of them a cascade may put generations: the dense
model distilled without pruning, each the teacher of what follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sparsekd.corpus import ALL, Share
from sparsekd.recipe import Compress, Distill, Recipe

Place = str | Path  # a model: a name, as in the recipe, or a folder of the run that has `model` in it
CORPUS = "corpus"
BENCH = "bench"
ARMS = "arms"  # of a reproduction
SHARED_CACHE = f"{ARMS}/teacher"  # the dense model's, which most arms share


def folder_of(where: Place, stage: str) -> Path:
    """Where a stage of a single model lies, `tasks` or `continuations`; every named model but the dense one only
    teaches and has none."""
    return (where if isinstance(where, Path) else Path("dense")) / stage


@dataclass(frozen=True)
class Round:
    """One prune-distil step; folders are relative to the run directory."""

    name: str
    seed: int  # of the statistics' sample, the labels drawn for curvature, and the order of the training blocks
    start: Place  # the model that is pruned further
    compress: Compress | None  # None: nothing is removed
    compressed: Path | None  # folder of the pruned model; rounds that differ only in training share it
    distill: Distill
    teachers: dict[Place, float]  # with their weights
    cache: str  # folder of the teachers' distributions; rounds with the same teachers share it
    share: Share = ALL  # of the corpus: what the statistics are taken from and the training learns from

    @property
    def student(self) -> Place:
        """What is trained: the pruned model, or the start as it is."""
        return self.compressed or self.start

    @property
    def distilled(self) -> Path:
        return Path(self.name) / "distilled"

    @property
    def evaluation(self) -> Path:
        return Path(self.name) / "eval"

    def models(self, dense: str) -> dict[str, Place]:
        """The models to evaluate, by name: the dense one and the round's own. A pruned model that rounds share is
        evaluated where it was made."""
        found: dict[str, Place] = {"dense": dense}
        if self.compressed is not None and self.compressed.parent == Path(self.name):
            found["compressed"] = self.compressed
        return found | {"distilled": self.distilled}


def planned(recipe: Recipe) -> list[Round]:
    """All rounds of a run: the cascade's generations, then one for each reduction. With `split_corpus` each has a
    share of the corpus."""
    made: list[Round] = []
    for number in range(1, recipe.teacher.cascade + 1):
        made.append(_next(recipe, made, f"generation-{number:02d}", None))
    for number, reduction in enumerate(recipe.rounds or [recipe.compress.reduction], 1):
        made.append(_next(recipe, made, f"round-{number:02d}", replace(recipe.compress, reduction=reduction)))
    return split(made) if recipe.split_corpus else made


def split(rounds: Sequence[Round]) -> list[Round]:
    """The rounds with equal shares of the corpus, in order."""
    return [replace(one, share=Share(number, len(rounds))) for number, one in enumerate(rounds, 1)]


def _next(recipe: Recipe, earlier: list[Round], name: str, compress: Compress | None) -> Round:
    """A generation starts from the dense model, a round from the round before; the newest teacher is the last
    generation, or with `recache` the last round, and the first teacher stays beside it with the anchor's weight."""
    dense = recipe.model.name
    rounds = [one for one in earlier if one.compress is not None]
    start = rounds[-1].distilled if rounds and compress is not None else dense
    newer = earlier if recipe.teacher.recache else [one for one in earlier if one.compress is None]
    models = recipe.teacher.models or {dense: 1.0}
    first: dict[Place, float] = {**models}
    teachers = first
    if newer:
        anchor, total = recipe.teacher.anchor, sum(first.values())
        teachers = {place: anchor * weight / total for place, weight in first.items() if anchor}
        teachers[newer[-1].distilled] = 1 - anchor
    shared = next((one.cache for one in earlier if one.teachers == teachers), None)
    compressed = None if compress is None else Path(name) / "compressed"
    return Round(name, recipe.seed, start, compress, compressed, recipe.distill, teachers, shared or f"{name}/cache")
