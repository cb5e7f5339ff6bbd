"""The curves of a training, why it stops, and the file that its lines are written to as they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from accelerate import Accelerator

from sparsekd import files
from sparsekd.records import Record

METRICS = "metrics.jsonl"  # in the stage's folder: a line for every step and every validation


@dataclass(frozen=True)
class Step:
    """One optimizer step, for the loss curve."""

    step: int
    loss: float
    kd: float
    ce: float
    grad_norm: float
    learning_rate: float
    num_tokens: int  # trained on so far
    seconds: float  # of this step


@dataclass(frozen=True)
class Validation:
    """Losses on the validation blocks, in nats a position; `agreement` is the share of positions where student and
    teacher hold the same token likeliest."""

    step: int
    loss: float
    kd: float
    ce: float
    perplexity: float
    agreement: float
    domains: dict[str, dict[str, float]] = field(default_factory=dict)  # the same by source of the blocks


@dataclass
class History:
    """Loss and validation curves, which weights were kept, and why training ended."""

    steps: list[Step]
    validations: list[Validation]
    best_step: int
    dense_ce: float | None = None  # cross-entropy of the dense model on the validation blocks, where it is known
    parity_step: int | None = None  # of the first validation whose cross-entropy is not above the dense model's
    stop_reason: str | None = None

    @property
    def num_tokens(self) -> int:
        """Trained on in all."""
        return self.steps[-1].num_tokens

    def as_dict(self) -> Record:
        return asdict(self)

    def add(self, validation: Validation) -> bool:
        """Takes a validation in and says whether it is the best so far."""
        is_best = all(validation.loss < earlier.loss for earlier in self.validations)
        self.validations.append(validation)
        if is_best:
            self.best_step = validation.step
        if self.parity_step is None and self.dense_ce is not None and validation.ce <= self.dense_ce:
            self.parity_step = validation.step
        return is_best


def history_of(state: Record) -> History:
    """From what `as_dict` gave, whatever stands beside it."""
    values = {key: state[key] for key in History.__dataclass_fields__}
    steps = [Step(**step) for step in state["steps"]]
    validations = [Validation(**validation) for validation in state["validations"]]
    return History(**values | {"steps": steps, "validations": validations})


def reason_to_stop(losses: Sequence[float], patience: int, min_improvement: float) -> str | None:
    """The paper's stopping rule (section IV-G): a clear minimum that then degrades, or saturation.

    `losses` are those of all validations so far. The last `patience` of them decide, each against the best one before
    them: all worse by more than the relative change `min_improvement` is a minimum passed, none better by more is
    saturation. Parity with the dense model is no reason: training goes on beyond it.
    """
    if len(losses) <= patience:
        return None
    best, recent = min(losses[:-patience]), losses[-patience:]
    if min(recent) > best * (1 + min_improvement):
        return f"a clear minimum: the last {patience} validations are worse than {best:.4f} before them"
    if min(recent) > best * (1 - min_improvement):
        return f"saturation: {patience} validations improved {best:.4f} by less than {min_improvement:.2%}"
    return None


class Metrics:
    """`metrics.jsonl`, and the trackers. It starts as what `history` knows, so a resumed training repeats no line."""

    def __init__(self, path: Path, history: History, accelerator: Accelerator):
        self._path, self._accelerator = path, accelerator
        if accelerator.is_main_process:
            lines = [files.as_json(_line(entry), str(path)) for entry in [*history.steps, *history.validations]]
            files.write_text(path, "".join(line + "\n" for line in lines))

    def add(self, entry: Step | Validation) -> None:
        if not self._accelerator.is_main_process:
            return
        line = _line(entry)
        files.append_line(self._path, line)
        numbers = {f"{line['kind']}/{k}": v for k, v in line.items() if isinstance(v, float)}
        for name, losses in line.get("domains", {}).items():
            numbers |= {f"{line['kind']}/{name}/{key}": value for key, value in losses.items()}
        self._accelerator.log(numbers, step=line["step"])


def _line(entry: Step | Validation) -> Record:
    return {"kind": type(entry).__name__.lower()} | asdict(entry)
