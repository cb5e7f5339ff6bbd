"""Replace the MLP weights of a model by low-rank or sparse ones; attention, norms and embeddings stay.

`compress` is the whole stage: statistics, solver, ranks, replacement. The low-rank methods project a matrix's outputs
on the directions that matter most; they differ in what "matters" means: `svd` (the paper's) looks at the weight alone,
`whitened` at the outputs on the calibration corpus, `two-sided` at what a change of these outputs does to the model's
distribution. `wanda` makes weights zero instead (`sparse.py`). A model that is compressed already is truncated
further, from its own trained factors and activations. `docs/compress.md` has the mathematics and what each costs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from sparsekd.compression import ranks, sparse
from sparsekd.compression.directions import directions_of
from sparsekd.compression.formats import convert as convert
from sparsekd.compression.formats import put
from sparsekd.compression.probe import Probe
from sparsekd.compression.ranks import Plan as Plan
from sparsekd.errors import DataError, UsageError
from sparsekd.models import in_float32, linear_weight, mark_compressed
from sparsekd.recipe import Compress, check_compress
from sparsekd.teacher import Targets


def compress(
    model: PreTrainedModel,
    blocks: Iterable[Int[Tensor, "_ _"]] | Int[Tensor, "N L"] | None = None,
    *,
    seed: int = 42,
    **options: Any,
) -> PreTrainedModel:
    """Makes the MLPs of `model` low-rank, in place, and returns it: an ordinary model with fewer weights; or, with
    `method="wanda", format="mask"`, the same model with zeros in them.

    `blocks` are token ids to take the statistics from, as one tensor or as batches; `svd` needs none. `options` are
    the fields of the recipe's `compress` section, such as `reduction` (the fraction of the dense model's MLP
    parameters to remove), `method`, `allocation`, `format`. A compressed model is truncated further. Raises
    `UsageError` for a value out of range or a model without an MLP, `DataError` for weights or activations that are
    not finite or too few tokens; the model is then unchanged.
    """
    unknown = options.keys() - Compress.__dataclass_fields__.keys()
    if unknown:
        raise UsageError(
            f"compress has no option {sorted(unknown)[0]!r}: known are {', '.join(Compress.__dataclass_fields__)}"
        )
    truncate(model, blocks, Compress(**options), seed=seed)
    return model


def plan(model: PreTrainedModel, options: Compress) -> Plan:
    """What the shapes alone decide: uniform ranks, or zeros. Works on a model without weights too."""
    return sparse.plan(model, options) if options.method == "wanda" else ranks.plan(model, options)


def truncate(
    model: PreTrainedModel,
    blocks: Iterable[Int[Tensor, "_ _"]] | Int[Tensor, "N L"] | None,
    options: Compress,
    *,
    seed: int = 42,
    teacher: Callable[[Int[Tensor, " L"]], Targets] | None = None,
    device: torch.device | None = None,
    separator: int | None = None,
    warn: Callable[[str], None] = warnings.warn,
) -> Plan:
    """What `compress` does, returning the plan with the damage that was predicted and measured for each matrix.

    `teacher` gives the cached distributions of a block, for the probe; without it the model's own are worked out. A
    `device` other than the model's takes the statistics there, a layer at a time. With a `separator`, the token that
    ends a document, packed documents do not see each other. `warn` hears of statistics from too few tokens.
    """
    check_compress(options)
    uniform = plan(model, options)
    _check_weights(model, uniform)
    batches: list[Tensor] = []
    if blocks is not None:
        batches = list(blocks.split(options.batch_size) if isinstance(blocks, Tensor) else blocks)
    with in_float32(model):  # what is solved from rounded numbers is rounded twice
        if options.method == "wanda":
            sparse.prune(model, uniform, batches, options, device=device, separator=separator)
            return uniform
        batches, probed = _split(batches, options.probe_tokens)
        found = directions_of(model, batches, options.method, seed=seed, device=device, separator=separator, warn=warn)
        probe = Probe(model, probed, teacher, separator) if probed else None
        chosen = ranks.choose(model, uniform, found, options, probe)
        factors = {}
        for matrix in chosen.matrices:
            projection = found.pop(matrix.name)  # from here on the factors stand for it: not both in memory
            if matrix.rank is not None:
                weight = linear_weight(model.get_submodule(matrix.name)).detach()
                factors[matrix.name] = projection.factors(weight, matrix.rank)
        put(model, factors, options.format)
        kept = {matrix.name: matrix.rank for matrix in chosen.matrices if matrix.rank is not None}
        description = {"format": options.format, "method": options.method, "allocation": options.allocation}
        mark_compressed(model, description | {"reduction": options.reduction, "ranks": kept})
        return chosen if probe is None else replace(chosen, measured_kl=probe.of_all())


def _check_weights(model: PreTrainedModel, planned: Plan) -> None:
    """Raises `DataError` for a matrix that is no matrix of finite floating point numbers."""
    for matrix in planned.matrices:
        weight = linear_weight(model.get_submodule(matrix.name))
        if weight.shape != (matrix.out_features, matrix.in_features) or not weight.is_floating_point():
            raise DataError(
                f"the weight of {matrix.name} is {tuple(weight.shape)} {weight.dtype}: expected floating point numbers "
                f"of shape {(matrix.out_features, matrix.in_features)}; a quantised model cannot be compressed"
            )
        if not torch.isfinite(weight).all():
            raise DataError(f"the weight of {matrix.name} is not finite: the model is damaged")


def _split(batches: list[Tensor], probe_tokens: int) -> tuple[list[Tensor], list[Tensor]]:
    """The batches to take statistics from, and the last ones, of `probe_tokens` tokens at least, for the probe: on
    what the statistics are fitted to, a truncation looks better than it is."""
    count = 0
    while sum(batch.numel() for batch in batches[len(batches) - count :]) < probe_tokens:
        count += 1
        if count >= len(batches):
            raise UsageError(f"compress.probe_tokens is {probe_tokens}: no blocks are left to take statistics from")
    return batches[: len(batches) - count], batches[len(batches) - count :]
