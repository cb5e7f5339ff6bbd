"""The learning rate of an arm: by short trainings on the arm's own model and objective."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sparsekd import distillation
from sparsekd.errors import Diverged
from sparsekd.run import Round, Work, trial_tokens
from sparsekd.run.stages import distill


@dataclass(frozen=True)
class Rate:
    """The learning rate of an arm, and the losses of those that were tried, by rate: None where the training
    diverges."""

    learning_rate: float
    losses: dict[str, float | None]


def search_rate(work: Work, round_: Round, rates: Sequence[float]) -> Rate:
    """Stage `search`: of `rates`, the one whose loss on the validation blocks is lowest after a quarter of an epoch, or
    65,536 tokens where that is less, by the round's own objective. One rate needs no search. Raises `Diverged` where
    the training diverges at all of them.
    """
    if len(rates) == 1:
        return Rate(rates[0], {})
    inputs = distill.inputs_of(work, round_)
    inputs["distill"] |= {"learning_rate": None}
    stage = work.run.stage(f"{round_.name}/search", inputs | {"rates": list(rates)})
    if stage.summary is not None:
        return Rate(stage.summary["learning_rate"], stage.summary["losses"])
    ids = work.blocks.order(round_.seed, 0, round_.share)
    length = work.recipe.corpus.seq_len
    num_tried = max(1, int(trial_tokens(len(ids) * length) / length))
    data = distill.data_of(work, round_, lambda epoch: ids[:num_tried])
    losses: dict[str, float | None] = {}
    for rate in rates:
        name = f"rate-{rate:g}.json"
        tried = stage.kept(name)
        if tried is None:
            tried = {"loss": _loss_at(work, round_, data, rate)}
            work.run.processes.wait()  # all have seen that it was not tried
            if work.run.processes.is_main:
                stage.keep(name, tried)
        loss = tried["loss"]
        losses[f"{rate:g}"] = loss
        said = "it diverges" if loss is None else f"validation loss {loss:.3f}"
        work.run.console.say(f"  rate {rate:g}: {said}")
    finite = [rate for rate in rates if losses[f"{rate:g}"] is not None]
    if not finite:
        raise Diverged(f"{round_.name}: the training diverges at every rate that was tried: give lower --rates")
    best = min(finite, key=lambda rate: losses[f"{rate:g}"] or math.inf)
    stage.finish({"losses": losses, "learning_rate": best})
    return Rate(best, losses)


def _loss_at(work: Work, round_: Round, data: distillation.Data, rate: float) -> float | None:
    """The validation loss of a trial with that learning rate; None where its numbers do not stay finite."""
    student, _ = distill.student_of(work, round_)
    options = replace(round_.distill, learning_rate=rate, epochs=1, validations=1, trackers=[])
    try:
        return distillation.train(student, data, options).validations[-1].loss
    except Diverged:
        return None
