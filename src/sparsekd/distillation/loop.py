"""Train the compressed model to match its teacher: one visible loop.

Every step takes `batch_size` blocks in the order that (seed, epoch) decides, shared out over the processes, adds up
the gradients of its micro batches, clips, and steps AdamW along a warm-up and a cosine. The loss is a sum over
positions divided by the positions of the whole step, so that micro batches, processes and padding leave the gradient
unchanged. Validation runs on blocks of other documents; the best weights are kept, the start included, so training
can only help by that measure. Nothing in it is random, and a training that was stopped ends with the same bytes.

How it runs on several processes (DDP, or FSDP2 where the launcher asks for it) is left to accelerate.
"""

from __future__ import annotations

import functools
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsekd import files
from sparsekd.corpus import shuffled
from sparsekd.device import out_of_memory, trains_in_bfloat16
from sparsekd.distillation.checkpoint import Checkpoints
from sparsekd.distillation.objective import Data, Objective, make_batch, require_document_mask
from sparsekd.distillation.optimizer import allocate, make_optimizer, prepared, schedule
from sparsekd.errors import DataError, Diverged, ResourceError, Stopped, UsageError
from sparsekd.models import forms, in_float32
from sparsekd.recipe import Distill, distill_section
from sparsekd.teacher import Cache

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

    def as_dict(self) -> dict[str, Any]:
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


def distill(
    student: PreTrainedModel,
    blocks: Tensor,
    cache: Cache,
    *,
    seed: int = 42,
    validation_fraction: float = 0.1,
    **options: Any,
) -> PreTrainedModel:
    """Trains `student`, in place, on `blocks` (N x L token ids) to match the teacher in `cache`, and returns it.

    Row i of `blocks` is block i of the cache. A share of the blocks, the last ones, is kept for validation. `options`
    are the fields of the recipe's `distill` section, such as `epochs`, `learning_rate`, `alpha`, `temperature`.
    Weights in half precision are trained in float32, where small steps are not lost, and rounded back at the end.
    Raises `UsageError` for an unknown option or too few blocks, `DataError` if the cache is of other tokens or the
    loss is not finite.
    """
    section = distill_section(options)
    held = max(1, round(len(blocks) * validation_fraction))
    if held >= len(blocks):
        raise UsageError(f"{len(blocks)} blocks are too few to train and validate on: at least 2 are needed")
    training = np.arange(len(blocks) - held)
    order = functools.partial(shuffled, training, seed)
    data = Data(list(blocks.numpy()), order, range(len(blocks) - held, len(blocks)), cache)
    train(student, data, section)
    return student


def train(
    student: PreTrainedModel,
    data: Data,
    options: Distill,
    *,
    folder: Path | None = None,
    dense_ce: float | None = None,
    on_step: Callable[[Step, int], None] = lambda step, num_steps: None,
    on_validation: Callable[[Validation], None] = lambda validation: None,
    say: Callable[[str], None] = lambda text: None,
    stop_signal: Callable[[], int | None] = lambda: None,
) -> History:
    """The training loop. With a `folder` it writes metrics and checkpoints there and continues from what it finds.

    `dense_ce`, the dense model's cross-entropy on the validation blocks, is what parity is measured against.
    `stop_signal` is asked after every step, never inside one: when it names a signal, the state is saved and `Stopped`
    raised. Raises `Diverged` before the step when the loss or the gradient is not finite, so that weights and
    checkpoints stay good, and `DataError` before the first one when the cache does not cover the blocks.
    """
    order = np.concatenate([data.order(epoch) for epoch in range(options.epochs)]).tolist()
    num_steps = math.ceil(len(order) / options.batch_size)
    num_validations = min(options.validations, num_steps)
    validation_steps = {round(num_steps * (i + 1) / num_validations) for i in range(num_validations)}
    _require_covered(data, order)
    with (
        in_float32(student),  # a step of bfloat16 weights is lost where it is less than half of their last digit
        _folder(folder) as place,
        _accelerated(student, options, place) as accelerator,
        prepared(student, options),
    ):
        optimizer, worker = _distribute(student, data, options, accelerator)
        # several micro batches add to gradients that are there in any case; one is spared them during its forward pass
        accumulates = options.micro_batch_size * accelerator.num_processes < options.batch_size
        allocate(optimizer, gradients=accumulates)
        guard = forms.guard(student)
        checkpoints = Checkpoints(place / "checkpoints", accelerator.is_main_process)
        state = checkpoints.restore(student, optimizer, say)
        if state is None:
            first = 0
            history = History([], [], 0, dense_ce)
            history.add(worker.validate(0, say))
            checkpoints.keep_best(student, 0)
            on_validation(history.validations[0])
        else:
            first, history = state["step"], _history(state)
        metrics = _Metrics(place / METRICS, history, accelerator)
        num_tokens = history.steps[-1].num_tokens if history.steps else 0
        last_save = time.monotonic()
        for step in range(first, num_steps):
            start = time.monotonic()
            ids = order[step * options.batch_size : (step + 1) * options.batch_size]
            learning_rate = options.learning_rate * schedule(step, num_steps, options.warmup_ratio)
            for group in optimizer.param_groups:
                group["lr"] = group["scale"] * learning_rate
            while (sums := worker.gradients(ids)) is None:  # memory ran out
                optimizer.zero_grad()
                worker.halve(say)
            if guard is not None:
                guard.drop_gradients()
            clipped: Any = accelerator.clip_grad_norm_(worker.objective.parameters(), options.max_grad_norm)
            loss, kd, ce = worker.summed(sums)
            grad_norm = float(clipped)
            _require_finite(step + 1, loss, grad_norm)
            optimizer.step()
            if guard is not None:
                guard.restore()
            optimizer.zero_grad(set_to_none=not accumulates)
            num_tokens += sum(len(data.blocks[i]) for i in ids)
            seconds = time.monotonic() - start
            history.steps.append(Step(step + 1, loss, kd, ce, grad_norm, learning_rate, num_tokens, seconds))
            metrics.add(history.steps[-1])
            on_step(history.steps[-1], num_steps)

            if step + 1 in validation_steps:
                validation = worker.validate(step + 1, say)
                if history.add(validation):
                    checkpoints.keep_best(student, step + 1)
                metrics.add(validation)
                on_validation(validation)
                if options.stop == "converged":
                    losses = [earlier.loss for earlier in history.validations]
                    history.stop_reason = reason_to_stop(losses, options.patience, options.min_improvement)
            if history.stop_reason is not None:
                break
            is_due = time.monotonic() - last_save > 60 * options.checkpoint_minutes
            stop, is_due = worker.agreed(stop_signal(), is_due)
            if stop is not None or is_due:
                checkpoints.save(student, optimizer, {"step": step + 1} | history.as_dict())
                last_save = time.monotonic()
            if stop is not None:
                raise Stopped(f"stopped by signal {stop} after step {step + 1} of {num_steps}; state saved", stop)
        optimizer.zero_grad()
        accelerator.wait_for_everyone()
        if history.best_step != (history.steps[-1].step if history.steps else 0):  # else the student has them already
            checkpoints.load_best(student, history.best_step)
    history.stop_reason = history.stop_reason or f"all {options.epochs} epochs are done"
    return history


def measure(model: PreTrainedModel, data: Data, options: Distill) -> Validation:
    """Losses of any model on the validation blocks; of the dense one, to know when the student has reached it."""
    accelerator = Accelerator(cpu=model.device.type == "cpu", mixed_precision="no")
    objective = Objective(model, options, data.teacher.vocab_size)
    return _Worker(objective, data, accelerator, model.device, objective.vocab_size, options.micro_batch_size).validate(
        0
    )


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


def _require_covered(data: Data, order: Sequence[int]) -> None:
    """Before the first step, not hours later: every block has its targets and something to predict."""
    needed = sorted({*order, *data.validation_ids})
    if isinstance(data.teacher, Cache):
        data.teacher.require(needed)
    for what, ids in (("training", order), ("validation", data.validation_ids)):
        if data.num_positions(list(ids)) == 0:
            raise DataError(f"the {what} blocks have no position that predicts a token: nothing to learn from")


@contextmanager
def _folder(folder: Path | None) -> Iterator[Path]:
    """`folder`, or a temporary one, of which every process has its own: only the main one's is written and read."""
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


@contextmanager
def _accelerated(student: PreTrainedModel, options: Distill, folder: Path) -> Iterator[Accelerator]:
    """Accelerate, with the trackers that the recipe names; raises `ResourceError` for one that is not installed."""
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in options.trackers:
        if name not in available:
            raise ResourceError(
                f"distill.trackers: {name} is not installed here; there are: {', '.join(available) or 'none'}"
            )
    trackers: Any = options.trackers or None
    on_cpu = student.device.type == "cpu"
    accelerator = Accelerator(cpu=on_cpu, mixed_precision="no", log_with=trackers, project_dir=folder)
    if options.trackers:
        accelerator.init_trackers("trackers")
    try:
        yield accelerator
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


def _distribute(
    student: PreTrainedModel, data: Data, options: Distill, accelerator: Accelerator
) -> tuple[Any, _Worker]:
    """The optimizer and this process's worker, as accelerate runs them: alone, with DDP, or with FSDP."""
    if accelerator.num_processes > 1:  # a single process leaves the student where it was put
        nn.Module.to(student, accelerator.device)
    if data.separator is not None:
        require_document_mask(student)
    bfloat16 = trains_in_bfloat16(options.precision, student.device)
    objective = Objective(student, options, data.teacher.vocab_size, bfloat16)
    device, vocab_size = student.device, objective.vocab_size
    wrapped, optimizer = accelerator.prepare(
        objective, make_optimizer(student, options), device_placement=[False, False]
    )
    return optimizer, _Worker(wrapped, data, accelerator, device, vocab_size, options.micro_batch_size)


@dataclass
class _Worker:
    """One process's share of the work, and how much of it goes through the model at once."""

    objective: Any  # an `Objective`, as accelerate wraps it
    data: Data
    accelerator: Accelerator
    device: torch.device
    vocab_size: int
    micro_batch_size: int

    def gradients(self, ids: Sequence[int]) -> Float[Tensor, " 3"] | None:
        """Adds the gradient of a step's blocks up; this process's part of loss, KD and CE. None: memory ran out."""
        denominator = self.data.num_positions(ids)
        if denominator == 0:
            raise DataError(f"no position of blocks {', '.join(map(str, ids))} predicts a token: nothing to learn from")
        sums = torch.zeros(3, device=self.device)
        shares = self._shares(ids)
        try:
            for number, micro in enumerate(shares, 1):
                batch = make_batch(self.data, micro, self.vocab_size, self.device)
                # only the last backward pass adds the gradients of all processes up
                with nullcontext() if number == len(shares) else self.accelerator.no_sync(self.objective):
                    outcome = self.objective(batch, denominator)
                    # which takes their mean, but the loss is a sum over all of them
                    (outcome.total * self.accelerator.num_processes).backward()
                sums += torch.stack([outcome.total, outcome.kd, outcome.ce]).detach()
        except Exception as error:
            if not out_of_memory(error):
                raise
            return None
        return sums

    def validate(self, step: int, say: Callable[[str], None] = lambda text: None) -> Validation:
        """Losses on the validation blocks, by source of the blocks and over all."""
        while (validation := self._validated(step)) is None:  # memory ran out
            self.halve(say)
        return validation

    @torch.no_grad()
    def _validated(self, step: int) -> Validation | None:
        sources = self.data.sources
        by_domain: dict[str, list[int]] = {}
        for block_id in self.data.validation_ids:
            by_domain.setdefault(sources[block_id] if sources is not None else "all", []).append(block_id)
        sums = torch.zeros(len(by_domain), 4, device=self.device)
        try:
            for row, ids in zip(sums, by_domain.values(), strict=True):
                for micro in self._shares(ids):
                    outcome = self.objective(make_batch(self.data, micro, self.vocab_size, self.device), 1)
                    row += torch.stack([value.float() for value in outcome])
        except Exception as error:
            if not out_of_memory(error):
                raise
            return None
        reduced: Any = self.accelerator.reduce(sums, "sum")
        sums = reduced.cpu().double()
        counts = torch.tensor([self.data.num_positions(ids) for ids in by_domain.values()]).to(sums)
        domains = {
            name: _losses(row / count)
            for name, row, count in zip(by_domain, sums, counts, strict=True)
            if int(count)  # a domain whose blocks are nothing but separators has no losses
        }
        overall = _losses(sums.sum(0) / counts.sum())
        if not math.isfinite(overall["loss"]):
            raise Diverged(f"the validation loss after step {step} is not finite: try a lower distill.learning_rate")
        return Validation(step, **overall, domains=domains)

    def summed(self, sums: Float[Tensor, " 3"]) -> list[float]:
        """The sums of all processes together."""
        reduced: Any = self.accelerator.reduce(sums, "sum")
        return reduced.tolist()

    def agreed(self, stop: int | None, is_due: bool) -> tuple[int | None, bool]:
        """The same decision everywhere: the signal that any process got, and whether the main one is due to save."""
        gathered: Any = self.accelerator.gather(torch.tensor([[stop or 0, is_due]], device=self.device))
        return int(gathered[:, 0].max()) or None, bool(gathered[0, 1])

    def halve(self, say: Callable[[str], None]) -> None:
        """A smaller micro batch after memory ran out; the step, and so the training, stays what it is but for rounding.

        Raises `ResourceError` where there is no smaller one.
        """
        size = self.micro_batch_size
        if self.accelerator.num_processes > 1 or size == 1:  # the other processes wait for this one: no second try
            raise ResourceError(
                f"out of memory with distill.micro_batch_size={size}: make it smaller, or set "
                "distill.gradient_checkpointing=true or a smaller corpus.seq_len"
            )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.micro_batch_size = size // 2
        say(f"  out of memory: distill.micro_batch_size is {size // 2} from here on, the step stays as it is")

    def _shares(self, ids: Sequence[int]) -> list[list[int]]:
        """This process's micro batches; as many as every other has, so some may be empty."""
        processes, micro_batch_size = self.accelerator.num_processes, self.micro_batch_size
        mine = list(ids[self.accelerator.process_index :: processes])
        count = math.ceil(math.ceil(len(ids) / processes) / micro_batch_size)
        return [mine[i * micro_batch_size : (i + 1) * micro_batch_size] for i in range(count)]


def _losses(means: Float[Tensor, " 4"]) -> dict[str, float]:
    loss, kd, ce, agreement = means.tolist()
    # e^700 is the last that a float can hold
    return {"loss": loss, "kd": kd, "ce": ce, "perplexity": math.exp(min(ce, 700.0)), "agreement": agreement}


def _require_finite(step: int, loss: float, grad_norm: float) -> None:
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        raise Diverged(
            f"step {step}: loss {loss}, gradient norm {grad_norm}: stopped before the weights are changed; "
            "try a lower distill.learning_rate"
        )


def _history(state: dict[str, Any]) -> History:
    values = {key: state[key] for key in History.__dataclass_fields__}
    steps = [Step(**step) for step in state["steps"]]
    validations = [Validation(**validation) for validation in state["validations"]]
    return History(**values | {"steps": steps, "validations": validations})


class _Metrics:
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


def _line(entry: Step | Validation) -> dict[str, Any]:
    return {"kind": type(entry).__name__.lower()} | asdict(entry)
