"""What the recipe alone decides of the stages, which a run directory is held to before anything is done."""

from __future__ import annotations

from collections.abc import Iterable

from sparsekd.recipe import Recipe, inputs_of
from sparsekd.records import Record
from sparsekd.run.rounds import CORPUS, Round


def settings_of(recipe: Recipe, rounds: Iterable[Round]) -> dict[str, Record]:
    """The settings of all stages of `rounds`, by their folders."""
    return {folder: values for round_ in rounds for folder, values in settings(recipe, round_).items()}


def settings(recipe: Recipe, round_: Round) -> dict[str, Record]:
    """What the recipe alone decides of the inputs of a round's stages, by their folders; evaluations follow it."""
    drawn = {"seed": round_.seed, "share": str(round_.share)}
    cached: Record = {"teacher": "online", "top_k": recipe.cache.top_k}
    if recipe.distill.teacher == "cache":
        cached = {"cache": inputs_of(recipe.cache)}
    is_mixed = recipe.teacher.mixture != "arithmetic" and len(round_.teachers) > 1
    cached["mixture"] = recipe.teacher.mixture if is_mixed else None  # None: as runs have it that knew of one only
    of_corpus = inputs_of(recipe.corpus) | {"order": list(recipe.corpus.sources)}
    found = {CORPUS: {"corpus": of_corpus, "seed": recipe.seed}, round_.cache: cached}
    if round_.compress is not None:
        found[str(round_.compressed)] = {"compress": inputs_of(round_.compress)} | drawn
    return found | {str(round_.distilled): {"distill": inputs_of(round_.distill)} | drawn}
