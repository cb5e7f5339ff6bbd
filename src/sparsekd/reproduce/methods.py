"""Experiment `methods`: every pruning method through the same cache, training and evaluation, in one table.

It is the paper's Table IX, which compares by words, with numbers. One seed runs all arms, the other seeds those of the
methods that lead.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

from transformers import PreTrainedModel

from sparsekd import export, models
from sparsekd.errors import ResourceError, UsageError
from sparsekd.records import Record
from sparsekd.reproduce.arms import DENSE_KD, Seed, arm
from sparsekd.reproduce.results import Result
from sparsekd.run import Round, Work

NAME = "methods"
LEADING = 4  # methods that further seeds are for


def leading(seed: Seed, results: Mapping[str, Result] | None = None) -> list[str]:
    """The arms that further seeds are for: the control, and those of the methods with the least mean log-perplexity
    after training, over texts and reductions. Without `results`, for an estimate, any methods."""

    def loss(method: str) -> float:
        assert results is not None
        measured = (results[arm(method, r)].models["distilled"].values() for r in seed.one_shot)
        return statistics.fmean(math.log(text["perplexity"]) for texts in measured for text in texts)

    ordered = seed.methods if results is None else sorted(seed.methods, key=loss)
    return [DENSE_KD, *(arm(method, r) for r in seed.one_shot for method in ordered[:LEADING])]


def facts_of(work: Work, round_: Round) -> Record:
    """Stage `facts`: what an arm's trained model weighs, and what opens it as it is: plain transformers, or else the
    folder with code of format `hf`, and the runtimes of the other formats."""
    stage = work.run.stage(f"{round_.name}/facts", {"model": work.identity(round_.distilled)})
    if stage.summary is not None:
        return stage.summary
    folder = str(work.run.folder / round_.distilled / "model")
    model = models.skeleton(folder)
    is_plain = not model.config.model_type.startswith(models.forms.PREFIX)
    opens_in = ["transformers"] if is_plain else []
    for name in export.names():
        if name != "dense" and not (is_plain and name == "hf") and _takes(name, model):
            opens_in.append(name)
    return stage.finish(
        {"parameters": models.num_parameters(model), "bytes": models.stored_bytes(folder), "opens_in": opens_in}
    )


def _takes(name: str, model: PreTrainedModel) -> bool:
    """Whether a format of `sparsekd export` takes the model, were its packages installed."""
    try:
        export.format_named(name).require(model)
    except UsageError:
        return False
    except ResourceError:
        return True
    return True
