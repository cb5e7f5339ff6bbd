"""What a micro batch costs: from blocks and their teacher's distributions to the loss of the student.

The loss is fused with the output projection where the model's logits are those that a fused loss knows, which a check
on a few tokens decides; else it takes full logits. Positions that are padding, or that end a document which the next
one must not be seen from, are left out before the output projection, so they cost nothing there.

Shape letters: B blocks, L positions, N predicted positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsekd.device import rounded_factors
from sparsekd.distillation.fused import linear_kd_loss
from sparsekd.distillation.losses import Loss, kd_loss, require_distinct
from sparsekd.distillation.weighting import entropy, within_blocks
from sparsekd.errors import DataError, UsageError
from sparsekd.models import document_positions, logits_of, output_weight, project, shared_vocab_size
from sparsekd.recipe import Distill
from sparsekd.teacher import Samples, Targets


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

    def positions_by_source(self, ids: Sequence[int]) -> dict[str, int]:
        """Raises `UsageError` for blocks of fewer sources than two."""
        sources = ["all"] * len(self.blocks) if self.sources is None else self.sources
        found = Counter[str]()
        for block_id in ids:
            found[sources[block_id]] += self.num_positions([block_id])
        if len(found) < 2:
            raise UsageError(
                "distill.weighting is domain, which compares sources: expected training blocks of two or more"
            )
        return dict(found)


class Batch(NamedTuple):
    tokens: Int[Tensor, "B L"]  # padded at the end: causal attention never looks right, so padding needs no mask
    positions: Int[Tensor, "B L"] | None  # None: 0, 1, ..
    rows: Int[Tensor, " N"]  # where, in B x L, the positions are that count
    labels: Int[Tensor, " N"]  # the tokens that follow them
    targets: Targets | Samples  # of these positions
    weights: Float[Tensor, " B"] | None = None  # of the blocks' KD; None: 1

    def to(self, device: torch.device) -> Batch:
        """On a GPU it arrives while the host goes on."""
        if device.type == "cpu":
            return self

        def moved(value: Tensor) -> Tensor:
            return (value.pin_memory() if device.type == "cuda" else value).to(device, non_blocking=True)

        targets = type(self.targets)(*map(moved, self.targets))
        positions, weights = (None if value is None else moved(value) for value in (self.positions, self.weights))
        return Batch(moved(self.tokens), positions, moved(self.rows), moved(self.labels), targets, weights)


def make_batch(data: Data, ids: Sequence[int], vocab_size: int) -> Batch:
    """Blocks, padded to the longest, with their targets, on the host. No ids: a batch that counts nothing, for a
    process that has to take part in a step without a block of its own. Raises `DataError` for tokens beyond
    `vocab_size`, and for targets that keep a token twice."""
    chosen = ids or [data.validation_ids[0]]
    blocks = [data.blocks[i] for i in chosen]
    tokens = np.zeros((len(blocks), max(map(len, blocks))), np.int64)
    counted = np.zeros(tokens.shape, bool)
    columns = []
    for row, (block_id, block) in enumerate(zip(chosen, blocks, strict=True)):
        tokens[row, : len(block)] = block
        counts = data.counted(block_id) & bool(ids)
        counted[row, : len(block) - 1] = counts
        read = data.teacher.read(block_id, block)
        columns.append([column[torch.from_numpy(counts)] for column in read])
    targets = type(read)(*(torch.cat(column) for column in zip(*columns, strict=True)))
    largest = max(int(tokens.max()), int(targets.ids.max()) if len(targets.ids) else 0)
    if largest >= vocab_size:
        raise DataError(
            f"blocks {', '.join(map(str, chosen))}: token {largest} is not in the vocabulary of {vocab_size} that "
            "teacher and student share"
        )
    rows = np.flatnonzero(counted)
    labels = torch.from_numpy(tokens.ravel()[rows + 1])
    require_distinct(targets)
    tensor = torch.from_numpy(tokens)
    positions = None if data.separator is None else document_positions(tensor, data.separator)
    return Batch(tensor, positions, torch.from_numpy(rows), labels, targets)


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

    def __init__(
        self,
        student: PreTrainedModel,
        options: Distill,
        teacher_vocab_size: int,
        bfloat16: bool = False,
        is_compiled: bool = False,
    ):
        """`is_compiled`: the loss, where it is fused."""
        super().__init__()
        self.student, self._options, self._bfloat16, self._is_compiled = student, options, bfloat16, is_compiled
        self._no_split_modules = student._no_split_modules  # what FSDP takes as a unit
        # the student's rows beyond the teacher's vocabulary are padding, however many they are
        known = min(output_weight(student).shape[0], teacher_vocab_size)
        self.vocab_size = shared_vocab_size({"the student": known, "the teacher": teacher_vocab_size})
        self._head = find_head(student)

    def forward(self, batch: Batch, denominator: int) -> Outcome:
        inputs = {"input_ids": batch.tokens}
        if batch.positions is not None:
            inputs["position_ids"] = batch.positions
        decoder: Any = self.student.get_decoder()
        settings: dict[str, Any] = {
            "mode": self._options.loss,
            "alpha": self._options.alpha,
            "temperature": self._options.temperature,
            "denominator": denominator,
            "checked": True,  # by `make_batch`
        }
        products = torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=self._bfloat16)
        if self._head.fused:
            with products:
                states = decoder(**inputs, use_cache=False).last_hidden_state
            hidden = states.flatten(0, 1).index_select(0, batch.rows)
            on_cpu = hidden.device.type == "cpu"
            if self._bfloat16:
                hidden = hidden.float() if on_cpu else hidden.bfloat16()
            weight = output_weight(self.student)  # whole: a slice's gradient would be one more matrix of this size
            settings |= {"scale": self._head.scale, "softcap": self._head.cap, "vocab_size": self.vocab_size}
            # on a CPU it was measured to gain nothing
            settings |= {"compiled": self._is_compiled and torch.is_grad_enabled() and not on_cpu}
            with rounded_factors(self._bfloat16 and on_cpu):  # which spares a copy of the matrix
                loss_of = functools.partial(linear_kd_loss, hidden, weight, batch.labels, batch.targets, **settings)
                loss = loss_of(weights=self._weights(batch, loss_of))
        else:
            with products:
                logits = logits_of(self.student, **inputs)[..., : self.vocab_size]
            logits = logits.flatten(0, 1).index_select(0, batch.rows)
            loss_of = functools.partial(kd_loss, logits, batch.labels, batch.targets, **settings)
            loss = loss_of(weights=self._weights(batch, loss_of))
        agreeing = torch.zeros((), dtype=torch.int64, device=batch.labels.device)
        if loss.likeliest is not None:
            scores = batch.targets[1]  # log-probabilities, or log-weights of samples
            likeliest = batch.targets.ids.gather(-1, scores.argmax(-1, keepdim=True))[:, 0]
            agreeing = (loss.likeliest == likeliest).sum()
        return Outcome(loss.total, loss.kd, loss.ce, agreeing)

    def _weights(self, batch: Batch, loss_of: Callable[[], Loss]) -> Float[Tensor, " N"] | None:
        """Of each position's KD in training; what is measured without gradient is not weighted."""
        weighting = self._options.weighting
        if weighting is None or not torch.is_grad_enabled():
            return None
        if weighting == "domain":
            assert batch.weights is not None
            return batch.weights[:, None].expand(batch.tokens.shape).flatten().index_select(0, batch.rows)
        if weighting == "entropy":
            assert isinstance(batch.targets, Targets)
            scores = entropy(batch.targets)
        else:
            with torch.no_grad():
                scores = loss_of().gaps
            assert scores is not None
        return within_blocks(scores, batch.rows, batch.tokens.shape)


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
