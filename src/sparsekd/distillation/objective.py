"""What a micro batch costs: from blocks and their teacher's distributions to the loss of the student.

The loss is fused with the output projection where the model's logits are those that a fused loss knows, which a check
on a few tokens decides; else it takes full logits. Positions that are padding, or that end a document which the next
one must not be seen from, are left out before the output projection, so they cost nothing there.

Shape letters: B blocks, L positions, N predicted positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsekd.distillation.losses import Loss, kd_loss, linear_kd_loss
from sparsekd.errors import DataError, UsageError
from sparsekd.models import document_positions, logits_of, output_weight, project, shared_vocab_size
from sparsekd.recipe import Distill
from sparsekd.teacher import Samples, Targets

_CHUNK = 256  # positions whose logits are held at once when only the likeliest token is wanted


@runtime_checkable
class Teacher(Protocol):
    """Where targets come from: a `Cache`, or a dense model that is asked at every step."""

    @property
    def vocab_size(self) -> int: ...

    def read(self, block_id: int, tokens: np.ndarray) -> Targets | Samples: ...


@dataclass(frozen=True)
class Data:
    """What to train on: blocks by id, the order of an epoch, the blocks to validate with, and who knows the targets."""

    blocks: Sequence[np.ndarray]  # int tokens by block id
    order: Callable[[int], np.ndarray]  # epoch -> block ids
    validation_ids: Sequence[int]
    teacher: Teacher
    sources: Sequence[str] | None = None  # the domain of each block, for validation; none: all are one
    separator: int | None = None  # the token that ends a document which the next must not see; none: they may

    def counted(self, block_id: int) -> Bool[np.ndarray, " N"]:
        """Which of a block's L - 1 predictions count: not those of another document's first token."""
        before = self.blocks[block_id][:-1]
        return np.ones(len(before), bool) if self.separator is None else before != self.separator

    def num_positions(self, ids: Sequence[int]) -> int:
        return sum(int(self.counted(i).sum()) for i in ids)


class Batch(NamedTuple):
    tokens: Int[Tensor, "B L"]  # padded at the end: causal attention never looks right, so padding needs no mask
    positions: Int[Tensor, "B L"] | None  # None: 0, 1, ..
    counted: Bool[Tensor, "B M"]  # M = L - 1
    targets: Targets | Samples  # of the counted positions


def make_batch(data: Data, ids: Sequence[int], vocab_size: int, device: torch.device) -> Batch:
    """Blocks, padded to the longest, with their targets. No ids: a batch that counts nothing, for a process that has
    to take part in a step without a block of its own. Raises `DataError` for tokens beyond `vocab_size`."""
    chosen = ids or [data.validation_ids[0]]
    blocks = [data.blocks[i] for i in chosen]
    tokens = np.zeros((len(blocks), max(map(len, blocks))), np.int64)
    counted = np.zeros((len(blocks), tokens.shape[1] - 1), bool)
    columns = []
    for row, (block_id, block) in enumerate(zip(chosen, blocks, strict=True)):
        tokens[row, : len(block)] = block
        counts = data.counted(block_id) & bool(ids)
        counted[row, : len(block) - 1] = counts
        read = data.teacher.read(block_id, block)
        columns.append([column[torch.from_numpy(counts)] for column in read])
    targets = type(read)(*(torch.cat(column).to(device) for column in zip(*columns, strict=True)))
    largest = max(int(tokens.max()), int(targets.ids.max()) if len(targets.ids) else 0)
    if largest >= vocab_size:
        raise DataError(
            f"blocks {', '.join(map(str, chosen))}: token {largest} is not in the vocabulary of {vocab_size} that "
            "teacher and student share"
        )
    on_device = torch.from_numpy(tokens).to(device)
    positions = None if data.separator is None else document_positions(on_device, data.separator)
    return Batch(on_device, positions, torch.from_numpy(counted).to(device), targets)


class Outcome(NamedTuple):
    """Of one micro batch; all but `agreeing` are sums over positions / denominator."""

    total: Float[Tensor, ""]  # differentiable
    kd: Float[Tensor, ""]
    ce: Float[Tensor, ""]
    agreeing: Int[
        Tensor, ""
    ]  # positions where student and teacher hold the same token likeliest; without gradient only


class Objective(nn.Module):
    """Student and loss as one module, so that DDP and FSDP see the one forward pass that they hook into."""

    def __init__(self, student: PreTrainedModel, options: Distill, teacher_vocab_size: int, bfloat16: bool = False):
        super().__init__()
        self.student, self._options, self._bfloat16 = student, options, bfloat16
        self._no_split_modules = student._no_split_modules  # what FSDP takes as a unit
        # the student's rows beyond the teacher's vocabulary are padding, however many they are
        known = min(output_weight(student).shape[0], teacher_vocab_size)
        self.vocab_size = shared_vocab_size({"the student": known, "the teacher": teacher_vocab_size})
        self._head = find_head(student)

    def forward(self, batch: Batch, denominator: int) -> Outcome:
        labels = batch.tokens[:, 1:][batch.counted]
        inputs = {"input_ids": batch.tokens}
        if batch.positions is not None:
            inputs["position_ids"] = batch.positions
        hidden = weight = logits = None
        with torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=self._bfloat16):
            if self._head.fused:
                decoder: Any = self.student.get_decoder()
                hidden = decoder(**inputs, use_cache=False).last_hidden_state[:, :-1][batch.counted]
            else:
                logits = logits_of(self.student, **inputs)[:, :-1][batch.counted][:, : self.vocab_size]
        if hidden is not None:
            weight = output_weight(self.student)  # whole: a slice's gradient would be one more matrix of this size
            hidden = hidden.bfloat16() if self._bfloat16 else hidden
        loss = _loss_of(
            hidden, weight, logits, labels, batch.targets, self._head, self.vocab_size, self._options, denominator
        )
        agreeing = torch.zeros((), dtype=torch.int64, device=labels.device)
        if not torch.is_grad_enabled():
            scores = batch.targets[1]  # log-probabilities, or log-weights of samples
            likeliest = batch.targets.ids.gather(-1, scores.argmax(-1, keepdim=True))[:, 0]
            agreeing = (_likeliest(hidden, weight, logits, self.vocab_size) == likeliest).sum()
        return Outcome(loss.total, loss.kd, loss.ce, agreeing)


def _loss_of(
    hidden: Tensor | None,
    weight: Tensor | None,
    logits: Tensor | None,
    labels: Tensor,
    targets: Targets | Samples,
    head: Head,
    vocab_size: int,
    options: Distill,
    denominator: int,
) -> Loss:
    """The loss from hidden states and output weight where there are any, else from logits."""
    settings: dict[str, Any] = {
        "mode": options.loss,
        "alpha": options.alpha,
        "temperature": options.temperature,
        "denominator": denominator,
    }
    if hidden is not None and weight is not None:
        settings |= {"scale": head.scale, "softcap": head.cap, "vocab_size": vocab_size}
        return linear_kd_loss(hidden, weight, labels, targets, **settings)
    assert logits is not None
    return kd_loss(logits, labels, targets, **settings)


def _likeliest(
    hidden: Tensor | None, weight: Tensor | None, logits: Tensor | None, vocab_size: int
) -> Int[Tensor, " N"]:
    """The student's likeliest tokens; scale and cap of the logits, both rising, do not change which."""
    if hidden is None or weight is None:
        assert logits is not None
        return logits.argmax(-1)
    matrix = weight[:vocab_size].to(hidden.dtype)
    return torch.cat([project(chunk, matrix).argmax(-1) for chunk in hidden.split(_CHUNK)])


class Head(NamedTuple):
    """How logits come from hidden states: `cap * tanh(scale * h W^T / cap)`, or some other way where not `fused`."""

    fused: bool
    scale: float = 1.0
    cap: float | None = None


@torch.no_grad()
def find_head(student: PreTrainedModel) -> Head:
    """Reads scale and cap of the logits from the config and believes them only if they give the model's own logits."""
    config = student.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1) / float(getattr(config, "logits_scaling", None) or 1)
    cap = getattr(config, "final_logit_softcapping", None)
    decoder: Any = student.get_decoder()
    sample = torch.arange(8, device=student.device)[None] % output_weight(student).shape[0]
    logits = logits_of(student, input_ids=sample)[0]
    ours = scale * project(decoder(input_ids=sample, use_cache=False).last_hidden_state[0], output_weight(student))
    if cap is not None:
        ours = cap * torch.tanh(ours / cap)
    fused = ours.shape == logits.shape and torch.allclose(ours, logits, rtol=1e-3, atol=1e-3)
    return Head(fused, scale, cap)


@torch.no_grad()
def require_document_mask(student: PreTrainedModel) -> None:
    """Raises `UsageError` unless the model keeps documents apart whose positions start again."""
    sample = torch.arange(12, device=student.device)[None]
    positions = document_positions(sample, separator=5)
    together = student(input_ids=sample, position_ids=positions, use_cache=False).logits[0, 6:]
    alone = student(input_ids=sample[:, 6:], use_cache=False).logits[0]
    if not torch.allclose(together, alone, rtol=1e-3, atol=1e-3):
        raise UsageError(
            f"corpus.document_mask: {type(student).__name__} does not keep packed documents apart: set it to false"
        )
