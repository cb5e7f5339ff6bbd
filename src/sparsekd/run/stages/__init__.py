"""The stages of a run as data: the one table that the pipeline, the report and `inspect` read.

A stage is a file here: `make` takes the run's work and the round, reuses what is finished, and returns the summary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sparsekd.run.reading import Summary
from sparsekd.run.rounds import CORPUS, Round
from sparsekd.run.stages import cache, compress, corpus, distill, evaluate
from sparsekd.run.work import Work


@dataclass(frozen=True)
class StageKind:
    """One of the stages."""

    name: str  # the verb that runs until it
    folder: Callable[[Round], str | Path | None]  # in the run directory; None of a round that has no such stage
    make: Callable[[Work, Round], Summary]
    shown: tuple[str, ...]  # what a report needs of the summary
    together: bool = False  # several processes share the work; else the main one does it and the others wait


OF_ROUND = {
    stage.name: stage
    for stage in (
        StageKind("cache", lambda one: one.cache, cache.make, ("tokens", "top_k", "bytes"), together=True),
        StageKind(
            "compress",
            lambda one: one.compressed,
            compress.make,
            ("matrices", "mlp_reduction", "model_reduction"),
            together=True,
        ),
        StageKind(
            "distill",
            lambda one: one.distilled,
            distill.make,
            ("steps", "validations", "best_step", "stop_reason"),
            together=True,
        ),
        StageKind("evaluate", lambda one: one.evaluation, evaluate.make, ("models",)),
    )
}
STAGES = {"corpus": StageKind("corpus", lambda _: CORPUS, corpus.make, ("tokens", "sources"))} | OF_ROUND


def folders_of(round_: Round) -> dict[str, str]:
    """The folder of each stage of a round, in order."""
    placed = {name: stage.folder(round_) for name, stage in OF_ROUND.items()}
    return {name: str(folder) for name, folder in placed.items() if folder is not None}
