"""What the arms came to, each with each seed, and the comparisons between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sparsekd.distillation import History
from sparsekd.evaluate import Perplexity, perplexity_of
from sparsekd.records import Record
from sparsekd.reproduce.patterns import DENSE, Model
from sparsekd.reproduce.rates import Rate
from sparsekd.reproduce.spread import Comparison, compare

Curve = Sequence[tuple[int, float]]  # tokens trained on, cross-entropy on the validation blocks
Measured = Mapping[str, Mapping[str, Record]]  # what was measured, by stage and text, as it is written


@dataclass(frozen=True)
class Result:
    """What an arm came to with one seed."""

    cut: Mapping[str, Any]  # the summary of stage `compress`; empty where nothing was removed
    rate: Rate
    history: History
    evaluated: Mapping[str, Any]  # the summary of stage `evaluate`
    tasks: dict[str, Record]  # the scores by stage; none where the experiment needs none
    facts: Record  # what the trained model weighs and what opens it; none where the experiment needs none

    @property
    def models(self) -> Measured:
        return self.evaluated["models"]

    @property
    def curve(self) -> Curve:
        """Cross-entropy on the validation blocks by the tokens trained on."""
        tokens_after = {step.step: step.num_tokens for step in self.history.steps}
        return [(tokens_after.get(v.step, 0), v.ce) for v in self.history.validations]

    def as_dict(self) -> Record:
        """Plain values for JSON."""
        steps = self.history.steps
        return {
            "mlp_reduction": self.cut.get("mlp_reduction", 0.0),
            "model_reduction": self.cut.get("model_reduction", 0.0),
            "learning_rate": self.rate.learning_rate,
            "losses": self.rate.losses,
            "tokens": self.history.num_tokens,
            "first_grad_norm": steps[0].grad_norm,
            "stop_reason": self.history.stop_reason,
            "validations": [asdict(validation) for validation in self.history.validations],
            "steps": [[step.step, step.num_tokens] for step in steps],
            "dense_ce": self.history.dense_ce,
            "models": self.models,
            "prefill": self.evaluated["prefill"],
            "tasks": self.tasks,
            "facts": self.facts,
        }


Arms = Mapping[str, Mapping[int, Result]]  # by the name of the arm and the seed


class Found:
    """The finished arms' perplexities by arm and seed, to be compared."""

    def __init__(self, arms: Mapping[str, Mapping[int, Measured]]):
        self._arms = arms
        self.texts = list(next(iter(next(iter(arms.values())).values()))[DENSE])

    def results(self, model: Model, text: str) -> dict[int, Perplexity]:
        """The model's perplexities on a text, by seed."""
        arm = next(iter(self._arms)) if model.arm is None else model.arm
        return {seed: perplexity_of(measured[model.stage][text]) for seed, measured in self._arms[arm].items()}

    def has(self, model: Model) -> bool:
        arm = self._arms.get(model.arm) if model.arm is not None else None
        return arm is not None and all(model.stage in measured for measured in arm.values())

    def compare(self, model: Model, reference: Model, text: str) -> Comparison:
        """With the seeds that both have."""
        found, other = self.results(model, text), self.results(reference, text)
        seeds = [seed for seed in found if seed in other]
        return compare([found[seed] for seed in seeds], [other[seed] for seed in seeds])
