"""How much the KD of each position counts: `distill.weighting`. The cross-entropy of all counts alike.

A position's weight comes from a score s, which is 0 or more:

    w = 1/2 + 1/2 s / mean(s)        1 where the mean is 0

so weights are never below 1/2 and their mean is 1: alpha and the learning rate keep their meaning. They are numbers,
through which no gradient goes.

    entropy   s is the teacher's entropy over its kept tokens and the tail. Positions where several tokens may follow
              teach more (EA-KD, Su et al. 2023, arXiv 2311.13621). The mean is that of the position's own block.
    gap       s is the student's KD there, at this step; the mean is that of the block.
    domain    s is the KD of the position's source at the latest validation; the mean is over the training positions.

A mean over a block is known to whoever has that block, so neither micro batches nor processes change a weight. That
weights are normalised, bounded and continuous in s is what Flouro and Chadwick (2026, arXiv 2601.17910) ask of weights.

Shape letters: B blocks, L positions, N positions that count, K kept tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsekd.distillation.history import Validation
from sparsekd.distillation.losses import ZERO
from sparsekd.teacher import Targets


def entropy(targets: Targets) -> Float[Tensor, " N"]:
    """In nats, of the (K+1)-way distributions that a cache holds: at most log(K + 1)."""
    log_p = torch.cat([targets.log_probs, targets.log_tail[:, None]], -1).float().clamp_min(ZERO)
    return -(log_p.exp() * log_p).sum(-1)


def within_blocks(scores: Float[Tensor, " N"], rows: Int[Tensor, " N"], shape: torch.Size) -> Float[Tensor, " N"]:
    """The weights of scores that stand at `rows` of B x L, the `shape`; the mean of each block's is 1."""

    def table(values: Tensor) -> Tensor:
        return values.new_zeros(math.prod(shape)).index_copy(0, rows, values).view(shape)

    scores = scores.clamp_min(0)  # of which rounding made one negative
    means = table(scores).sum(-1, keepdim=True) / table(torch.ones_like(scores)).sum(-1, keepdim=True)
    means = means.expand(shape).flatten().index_select(0, rows)
    return torch.where(means > 0, 0.5 + 0.5 * scores / means, 1.0)


def by_source(validation: Validation, num_positions: Mapping[str, int]) -> dict[str, float]:
    """The weights of the sources, whose mean over the training positions, `num_positions` of each, is 1. A source
    without a validation block has the score of all together."""
    kd = {name: max(0.0, validation.domains.get(name, {"kd": validation.kd})["kd"]) for name in num_positions}
    mean = sum(kd[name] * count for name, count in num_positions.items()) / sum(num_positions.values())
    return {name: 0.5 + 0.5 * kd[name] / mean if mean > 0 else 1.0 for name in num_positions}
