"""Train the compressed model to match the cache: one visible loop.

Every step takes `batch_size` blocks in the order that (seed, epoch) decides, adds up the gradients of its micro
batches, clips, and steps AdamW along a warm-up and a cosine. Validation runs on blocks of other documents; the best
weights are kept, the start included, so training can only help by that measure. Dropout stays off: the teacher's
distributions were made without it, and a resumed run repeats the same numbers.

Shape letters: B blocks, L positions, N predicted positions, D hidden size, K kept tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsekd import checkpoint
from sparsekd.cache import Cache, Targets
from sparsekd.errors import DataError, Stopped, UsageError
from sparsekd.losses import Loss, kd_loss, linear_kd_loss
from sparsekd.models import output_weight
from sparsekd.recipe import Distill


@dataclass(frozen=True)
class Data:
    """What to train on: blocks by id, the order of an epoch, and the blocks to validate with."""

    blocks: Sequence[np.ndarray]  # int tokens by block id
    order: Callable[[int], np.ndarray]  # epoch -> block ids
    validation_ids: Sequence[int]
    cache: Cache


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
    step: int
    loss: float
    kd: float
    ce: float


@dataclass
class History:
    """Loss and validation curves, and which weights were kept."""

    steps: list[Step]
    validations: list[Validation]
    best_step: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


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
    Raises `UsageError` for an unknown option or too few blocks, `DataError` if the cache is of other tokens or the
    loss is not finite.
    """
    unknown = options.keys() - Distill.__dataclass_fields__.keys()
    if unknown:
        raise UsageError(
            f"distill has no option {sorted(unknown)[0]!r}: known are {', '.join(Distill.__dataclass_fields__)}"
        )
    held = max(1, round(len(blocks) * validation_fraction))
    if held >= len(blocks):
        raise UsageError(f"{len(blocks)} blocks are too few to train and validate on: at least 2 are needed")
    training = np.arange(len(blocks) - held)

    def order(epoch: int) -> np.ndarray:
        return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(training)

    data = Data(list(blocks.numpy()), order, range(len(blocks) - held, len(blocks)), cache)
    train(student, data, Distill(**options))
    return student


def train(
    student: PreTrainedModel,
    data: Data,
    options: Distill,
    *,
    folder: Path | None = None,
    on_step: Callable[[Step, int], None] = lambda step, num_steps: None,
    on_validation: Callable[[Validation], None] = lambda validation: None,
    stop_signal: Callable[[], int | None] = lambda: None,
) -> History:
    """The training loop. With a `folder` it keeps a checkpoint there and continues from one it finds.

    `stop_signal` is asked after every step; when it names a signal, the state is saved and `Stopped` raised. Raises
    `DataError` before the step when the loss or the gradient is not finite: weights and checkpoint stay good.
    """
    order = np.concatenate([data.order(epoch) for epoch in range(options.epochs)]).tolist()
    num_steps = math.ceil(len(order) / options.batch_size)
    validation_steps = {round(num_steps * (i + 1) / options.validations) for i in range(options.validations)}
    student.eval()
    optimizer = torch.optim.AdamW(
        student.parameters(), options.learning_rate, betas=(0.9, 0.95), weight_decay=options.weight_decay
    )
    loss_of = _loss_function(student, data.blocks[order[0]])
    saved = checkpoint.restore(folder / "checkpoint", student, optimizer) if folder else None
    if saved is None:
        first, num_tokens = 0, 0
        history = History([], [_validate(loss_of, data, options, 0)], 0)
        best = _copy(student)
        on_validation(history.validations[0])
    else:
        best, state = saved
        first, num_tokens = state["step"], state["num_tokens"]
        history = History(
            [Step(**step) for step in state["steps"]],
            [Validation(**validation) for validation in state["validations"]],
            state["best_step"],
        )

    def save(step: int) -> None:
        if folder is not None:
            checkpoint.save(
                folder / "checkpoint",
                student,
                best,
                optimizer,
                {"step": step, "num_tokens": num_tokens} | history.as_dict(),
            )

    last_save = time.monotonic()
    for step in range(first, num_steps):
        start = time.monotonic()
        ids = order[step * options.batch_size : (step + 1) * options.batch_size]
        denominator = sum(len(data.blocks[i]) - 1 for i in ids)
        learning_rate = options.learning_rate * _schedule(step, num_steps, options.warmup_ratio)
        optimizer.param_groups[0]["lr"] = learning_rate
        loss = kd = ce = 0.0
        for micro in range(0, len(ids), options.micro_batch_size):
            part = loss_of(data, ids[micro : micro + options.micro_batch_size], options, denominator)
            part.total.backward()
            loss, kd, ce = loss + float(part.total.detach()), kd + float(part.kd), ce + float(part.ce)
        grad_norm = float(torch.nn.utils.clip_grad_norm_(student.parameters(), options.max_grad_norm))
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            raise DataError(
                f"step {step + 1}: loss {loss}, gradient norm {grad_norm}: stopped before the weights are changed; "
                "try a lower distill.learning_rate"
            )
        optimizer.step()
        optimizer.zero_grad()
        num_tokens += sum(len(data.blocks[i]) for i in ids)
        seconds = time.monotonic() - start
        history.steps.append(Step(step + 1, loss, kd, ce, grad_norm, learning_rate, num_tokens, seconds))
        on_step(history.steps[-1], num_steps)

        if step + 1 in validation_steps:
            validation = _validate(loss_of, data, options, step + 1)
            if validation.loss < min(earlier.loss for earlier in history.validations):
                history.best_step, best = step + 1, _copy(student)
            history.validations.append(validation)
            on_validation(validation)
        stop = stop_signal()
        if stop is not None:
            save(step + 1)
            raise Stopped(f"stopped by signal {stop} after step {step + 1} of {num_steps}; state saved", stop)
        if time.monotonic() - last_save > 60 * options.checkpoint_minutes:
            save(step + 1)
            last_save = time.monotonic()
    checkpoint.load_state(student, best)
    return history


def _schedule(step: int, num_steps: int, warmup_ratio: float) -> float:
    """Linear warm-up, then half a cosine to a tenth of the peak."""
    warmup = round(num_steps * warmup_ratio)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, num_steps - warmup)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))


def _copy(student: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in checkpoint.unique_state(student).items()}


LossFunction = Callable[[Data, Sequence[int], Distill, int], Loss]


@torch.no_grad()
def _validate(loss_of: LossFunction, data: Data, options: Distill, step: int) -> Validation:
    num_rows = sum(len(data.blocks[i]) - 1 for i in data.validation_ids)
    parts = [
        loss_of(data, data.validation_ids[i : i + options.micro_batch_size], options, num_rows)
        for i in range(0, len(data.validation_ids), options.micro_batch_size)
    ]
    loss, kd, ce = (sum(float(value) for value in column) for column in zip(*parts, strict=True))
    if not math.isfinite(loss):
        raise DataError(f"the validation loss after step {step} is not finite")
    return Validation(step, loss, kd, ce)


def _loss_function(student: PreTrainedModel, tokens: np.ndarray) -> LossFunction:
    """The fused loss when the logits are a plain product of hidden states and output weight, which is checked on
    some tokens; else, for models that scale, cap or shift their logits, the loss from full logits."""
    decoder, head = student.get_decoder(), output_weight(student)
    with torch.no_grad():
        sample = _tensor(tokens[None, :8], student)
        logits = student(input_ids=sample, use_cache=False).logits
        plain = decoder(input_ids=sample, use_cache=False).last_hidden_state @ head.T
    fused = plain.shape == logits.shape and torch.allclose(plain, logits, rtol=1e-3, atol=1e-3)

    def loss_of(data: Data, ids: Sequence[int], options: Distill, denominator: int) -> Loss:
        blocks = [data.blocks[i] for i in ids]
        lengths = [len(block) for block in blocks]
        padded = np.zeros((len(blocks), max(lengths)), np.int64)
        for row, block in zip(padded, blocks, strict=True):
            row[: len(block)] = block
        tokens = _tensor(padded, student)
        # causal attention never looks right, so padding at the end needs no mask: its positions are left out here
        predicts = _tensor(np.arange(max(lengths) - 1)[None] < np.array(lengths)[:, None] - 1, student)
        labels = tokens[:, 1:][predicts]
        read = [data.cache.read(i, block) for i, block in zip(ids, blocks, strict=True)]
        targets = Targets(*(torch.cat(column).to(student.device) for column in zip(*read, strict=True)))
        settings = {"alpha": options.alpha, "temperature": options.temperature, "denominator": denominator}
        if fused:
            hidden = decoder(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1][predicts]
            return linear_kd_loss(hidden, head, labels, targets, **settings)
        logits = student(input_ids=tokens, use_cache=False).logits[:, :-1][predicts]
        return kd_loss(logits, labels, targets, **settings)

    return loss_of


def _tensor(array: np.ndarray, student: PreTrainedModel) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(student.device)
