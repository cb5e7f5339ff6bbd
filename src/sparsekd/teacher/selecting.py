"""What is kept of a distribution: the likeliest tokens and the sums over the rest, or a few tokens drawn without bias.

Pure functions of logits. Shape letters: N positions of one block, V vocabulary, K kept tokens, U drawn tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsekd.device import in_float64
from sparsekd.teacher.codecs import Samples, Targets

_CHUNK = 1024  # positions whose distribution is worked out at once; bounds the temporaries beside the logits
_CHUNK_ON_CPU = 32  # their logits, which are read several times, stay in the processor's cache
_GROUP = 64  # tokens, of which the likeliest is looked for first


@torch.inference_mode()
def top_k_distribution(logits: Float[Tensor, "*N V"], top_k: int) -> Targets:
    """The `top_k` likeliest tokens of each row, their log-probabilities over all of V, and the rest's sums.

    The tail is summed over the other tokens themselves, not taken as 1 minus the top, so it is exact when tiny. It is
    at least e^-30, which fp16 can hold as a logarithm.
    """
    z = logits.float()
    top, ids = _likeliest(z, top_k)
    m = top[..., :1]
    e = (z - m).mul_(0.5).exp_().scatter_(-1, ids, 0.0)  # square roots
    tail = torch.linalg.vector_norm(e, dim=-1).square()
    tail_half = e.sum(-1)
    log_sum = ((top - m).exp().sum(-1) + tail).log()
    log_tail = (tail.log() - log_sum).clamp_min(-30.0)
    log_tail_half = (tail_half.log() - log_sum / 2).clamp_min(-15.0)
    return Targets(ids, top - m - log_sum[..., None], log_tail, log_tail_half)


def _likeliest(z: Float[Tensor, "*N V"], top_k: int) -> tuple[Float[Tensor, "*N K"], Int[Tensor, "*N K"]]:
    """What `z.topk` gives, twice as fast: first the K groups of tokens that have the largest maxima, for no other can
    hold one of the K largest logits, then these among their tokens."""
    whole = z.shape[-1] // _GROUP * _GROUP
    if whole < _GROUP * top_k:
        return z.topk(top_k, dim=-1)
    groups = z[..., :whole].unflatten(-1, (-1, _GROUP))
    best = groups.amax(-1).topk(top_k, dim=-1).indices[..., None]
    ids = (best * _GROUP + torch.arange(_GROUP, device=z.device)).flatten(-2)
    ids = torch.cat([ids, torch.arange(whole, z.shape[-1], device=z.device).expand(*z.shape[:-1], -1)], -1)
    top, places = z.gather(-1, ids).topk(top_k, dim=-1)
    return top, ids.gather(-1, places)


@torch.inference_mode()
def sampled_distribution(logits: Float[Tensor, "N V"], num_samples: int, uniforms: Float[Tensor, " N"]) -> Samples:
    """U tokens a row, all different, with weights that sum to one and whose expectation is the row's distribution.

    Token i is drawn with probability pi_i = min(1, p_i / t), where t makes the pi_i sum to U, and then has the weight
    p_i / pi_i: its own p_i where it is certain to be drawn, t elsewhere. So E[weight_i] = p_i (Horvitz and Thompson
    1952); of all ways to draw U tokens it is the one with the least variance (Cohen et al., "Stream sampling for
    variance-optimal estimation of subset sums", SODA 2009). The tokens that are not certain are drawn systematically,
    at u, u + 1, ... along the running sum of pi (Madow 1949), by one of the `uniforms`, in [0, 1), for each row.
    """
    p = in_float64(logits).softmax(-1)
    top, top_ids = p.topk(min(num_samples, p.shape[-1]), dim=-1)
    slots = torch.arange(top.shape[-1], device=p.device)
    left = top.shape[-1] - slots  # slots from each rank on
    share = (1 - top.cumsum(-1) + top) / left  # t, if all ranks before were certain
    num_certain = (top >= share * (1 - 1e-9)).cumprod(-1).sum(-1, keepdim=True)
    is_certain = slots < num_certain
    rest = p.scatter(-1, top_ids, torch.where(is_certain, 0.0, top))
    t = rest.sum(-1, keepdim=True) / (top.shape[-1] - num_certain).clamp_min(1)
    points = (uniforms.to(p)[:, None] + slots - num_certain) * t
    drawn = torch.searchsorted(rest.cumsum(-1), points, right=True).clamp_max(p.shape[-1] - 1)
    ids = torch.where(is_certain, top_ids, drawn)
    return Samples(ids, torch.where(is_certain, top, t).log().float())


def uniforms(seed: int, block_id: int, count: int) -> Float[Tensor, " N"]:
    """What decides a block's draws: a function of seed and block id alone."""
    generator = np.random.Generator(np.random.Philox(key=[seed, block_id]))
    return torch.from_numpy(generator.random(count))


def by_chunks(distribution: Callable[..., Any], logits: Tensor, *rows: Tensor) -> Any:
    """`distribution` of a block's positions, some at a time, so that temporaries stay small."""
    size = _CHUNK_ON_CPU if logits.device.type == "cpu" else _CHUNK
    parts = [distribution(*chunk) for chunk in zip(*(column.split(size) for column in (logits, *rows)), strict=True)]
    return type(parts[0])(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
