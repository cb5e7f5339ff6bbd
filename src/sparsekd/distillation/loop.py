"""Train the compressed model to match its teacher: one visible loop.

Every step takes `batch_size` blocks in the order that (seed, epoch) decides, shared out over the processes, adds up
the gradients of its micro batches, clips, and steps AdamW along a warm-up and a cosine. The loss is a sum over
positions divided by the positions of the whole step, so that micro batches, processes and padding leave the gradient
unchanged. Validation runs on blocks of other documents; the best weights are kept, the start included, so training
can only help by that measure. Nothing in it is random, and a training that was stopped ends with the same bytes.

How it runs on several processes (DDP, or FSDP2 where the launcher asks for it) is in `worker.py`.
"""

from __future__ import annotations

import functools
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from sparsekd.corpus import shuffled
from sparsekd.device import beside, bfloat16_gain, multiplies_bfloat16, trains_in_bfloat16
from sparsekd.distillation.checkpoint import Checkpoints
from sparsekd.distillation.history import METRICS, History, Metrics, Step, Validation, history_of, reason_to_stop
from sparsekd.distillation.objective import Data, Objective
from sparsekd.distillation.optimizer import allocate, prepared, schedule
from sparsekd.distillation.weighting import by_source
from sparsekd.distillation.worker import Worker, accelerated, compiled, device_of, distribute, is_worth_compiling
from sparsekd.errors import DataError, Diverged, Stopped, UsageError
from sparsekd.models import forms, in_float32, initialise, is_split, split
from sparsekd.recipe import Distill, distill_section
from sparsekd.teacher import Cache


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
    if section.start == "fresh":
        initialise(student, seed)
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
    """The training loop, from the student as it is, whatever `options.start`. With a `folder` it writes metrics and
    checkpoints there and continues from what it finds.

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
    num_positions = data.positions_by_source(order) if options.weighting == "domain" else None
    _warn_of_slow_bfloat16(student, options, say)
    is_compiled = is_worth_compiling(student, options, sum(len(data.blocks[i]) for i in order))
    with (
        in_float32(student),  # a step of bfloat16 weights is lost where it is less than half of their last digit
        _folder(folder) as place,
        accelerated(student, options, place) as accelerator,
        prepared(student, options),
        compiled(student, is_compiled),
        beside(device_of(student)) as reader,
        beside(device_of(student)) as writer,
    ):
        optimizer, worker = distribute(student, data, options, accelerator, reader, is_compiled)
        # several micro batches add to gradients that are there in any case; one is spared them during its forward pass
        accumulates = options.micro_batch_size * accelerator.num_processes < options.batch_size
        allocate(optimizer, gradients=accumulates)
        guard = forms.guard(student)
        checkpoints = Checkpoints(place / "checkpoints", accelerator.is_main_process, writer)
        state = checkpoints.restore(student, optimizer, say)
        if state is None:
            first = 0
            history = History([], [], 0, dense_ce)
            history.add(worker.validate(0, say))
            checkpoints.keep_best(student, 0)
            on_validation(history.validations[0])
        else:
            first, history = state["step"], history_of(state)
        metrics = Metrics(place / METRICS, history, accelerator)
        num_tokens = history.steps[-1].num_tokens if history.steps else 0
        last_save = time.monotonic()
        for step in range(first, num_steps):
            start = time.monotonic()
            ids = order[step * options.batch_size : (step + 1) * options.batch_size]
            learning_rate = options.learning_rate * schedule(step, num_steps, options)
            for group in optimizer.param_groups:
                group["lr"] = group["scale"] * learning_rate
            worker.read_ahead(order[(step + 1) * options.batch_size : (step + 2) * options.batch_size])
            weights = None if num_positions is None else by_source(history.validations[-1], num_positions)
            while (sums := worker.gradients(ids, weights)) is None:  # memory ran out
                optimizer.zero_grad()
                worker.halve(say)
            if guard is not None:
                guard.drop_gradients()
            grad_norm = worker.clip(options.max_grad_norm)
            loss, kd, ce = worker.summed(sums)
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
                checkpoints.wait()
                raise Stopped(f"stopped by signal {stop} after step {step + 1} of {num_steps}; state saved", stop)
        optimizer.zero_grad()
        checkpoints.wait()
        accelerator.wait_for_everyone()
        if history.best_step != (history.steps[-1].step if history.steps else 0):  # else the student has them already
            checkpoints.load_best(student, history.best_step)
    history.stop_reason = history.stop_reason or f"all {options.epochs} epochs are done"
    return history


def measure(model: PreTrainedModel, data: Data, options: Distill) -> Validation:
    """Losses of any model on the validation blocks; of the dense one, to know when the student has reached it. Under
    FSDP the model is split by it, for good."""
    device = device_of(model)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no")
    bfloat16 = trains_in_bfloat16(options.precision, device)  # as the student whom it is compared with
    objective = Objective(model, options, data.teacher.vocab_size, bfloat16)
    if is_split():
        split(model, objective)
    with beside(device) as reader:
        size = options.micro_batch_size
        worker = Worker(objective, data, accelerator, device, objective.vocab_size, bfloat16, size, reader)
        return worker.validate(0)


def _warn_of_slow_bfloat16(student: PreTrainedModel, options: Distill, say: Callable[[str], None]) -> None:
    is_asked = options.precision == "bfloat16" and student.device.type == "cpu"
    if is_asked and not multiplies_bfloat16(student.device):
        say(
            "warning: distill.precision is bfloat16, in which this processor multiplies "
            f"{bfloat16_gain():.2f} times as fast as in float32: auto chooses the faster"
        )


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


def _require_finite(step: int, loss: float, grad_norm: float) -> None:
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        raise Diverged(
            f"step {step}: loss {loss}, gradient norm {grad_norm}: stopped before the weights are changed; "
            "try a lower distill.learning_rate"
        )
