"""A narrower residual stream by principal components: the width, the bases, and the cut of the method `slicegpt`.

From the first norm to the last: the second moment of what the norm reads, in the model that is sliced up to there; its
first eigenvectors are the basis. While this is worked out the model stays dense, and the stream is projected on the
bases found so far.

Shape letters: D hidden size, H width that is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsekd.compression.calibration import Calibration
from sparsekd.compression.plan import MatrixPlan, Plan, require_form
from sparsekd.compression.statistics import Gram
from sparsekd.device import solver_device
from sparsekd.errors import DataError, UsageError
from sparsekd.models import find_mlps, hidden_size, num_parameters, shape, twin
from sparsekd.models.forms import sliced

_CHECKED = 32  # tokens on which the sliced model is compared with the projected one
_DIFFERENCE = 1e-2  # between them, as a share of the largest logit: what rounding in float32 makes


def plan_of(model: PreTrainedModel, reduction: float, multiple: int, method: str) -> Plan:
    """The widest stream, a multiple of `multiple`, that leaves at most `1 - reduction` of the MLP parameters.

    Works on a model without weights too. Raises `UsageError` for a compressed model, for one that is built otherwise,
    and for a reduction that multiples cannot reach.
    """
    require_form(model, (), method)
    stream = sliced.find_stream(model)
    return _with_width(model, stream, width_for(model, stream, reduction, multiple), reduction)


def width_for(model: PreTrainedModel, stream: sliced.Stream, reduction: float, multiple: int) -> int:
    """The width that `plan_of` takes; the parameters of the MLPs are linear in it."""
    if multiple >= hidden_size(model):
        raise UsageError(
            f"the width is a multiple of {multiple}, but the model has {hidden_size(model)} features: expected less"
        )
    least = _with_width(model, stream, multiple, reduction)
    spare = (1 - reduction) * least.mlp_parameters_before - least.mlp_parameters_after
    if spare < 0:
        raise UsageError(
            f"reduction is {reduction:g}: with a width in multiples of {multiple} at most {least.mlp_reduction:.1%} of "
            "the MLP parameters can be removed"
        )
    feature = sum(
        num_parameters(model.get_submodule(mlp.output)) // hidden_size(model)
        + sum(shape(model.get_submodule(name))[1] for name in mlp.inputs)
        for mlp in find_mlps(model)
    )
    # the small term keeps a budget that is a whole number from losing a feature to rounding
    return multiple + int(spare / feature / multiple + 1e-9) * multiple


def _with_width(model: PreTrainedModel, stream: sliced.Stream, width: int, reduction: float) -> Plan:
    """The plan with a stream of that width."""
    made = sliced.without_weights(model, sliced.described(model, stream, width))
    lines = []
    for name in (name for mlp in find_mlps(model) for name in mlp.matrices):
        module = model.get_submodule(name)
        inputs, outputs = shape(module)
        before, after = num_parameters(module), num_parameters(made.get_submodule(name))
        lines.append(MatrixPlan(name, inputs, outputs, None, min(inputs, outputs), before, after))
    others = num_parameters(made) - sum(line.parameters_after for line in lines)
    return Plan(lines, num_parameters(model), reduction, other_parameters_after=others)


def slice_stream(model: PreTrainedModel, reduction: float, multiple: int, calibration: Calibration) -> None:
    """Makes the residual stream as wide as `plan_of` says, in place, or leaves the model as it is.

    Raises `UsageError` for fewer tokens than features and for a model that does not compute what it should afterwards,
    `DataError` for activations that are not finite.
    """
    calibration.require_tokens(hidden_size(model))
    stream = sliced.find_stream(model)
    cut(model, stream, width_for(model, stream, reduction, multiple), calibration)


def cut(model: PreTrainedModel, stream: sliced.Stream, width: int, calibration: Calibration) -> None:
    """The same for a width; that of the dense model changes nothing but the basis."""
    norms = [sliced.norm_of(model, name) for name in stream.norms]
    if len({norm.is_centred for norm in norms}) > 1:
        raise UsageError(
            f"{type(model).__name__} has norms that centre the residual stream and norms that do not: compress.method "
            "slicegpt expected one kind; neurons or two-sided takes this model"
        )
    bases = bases_of(model, stream, norms, width, calibration)
    layers, weights = sliced.described(model, stream, width), sliced.rotated(model, stream, norms, bases)
    tokens = calibration.batches[0].tokens[:1, :_CHECKED].to(model.device)
    with ExitStack() as hooks:
        for name, branch, norm, basis in zip(stream.norms, [*stream.branches, None], norms, bases, strict=True):
            _project(model, name, branch and branch.name, norm, basis, hooks)
        expected = _logits(model, tokens)
    trial = twin(model)
    sliced.put(trial, layers, weights)
    difference = (_logits(trial, tokens) - expected).abs().max() / expected.abs().max()
    if not difference <= _DIFFERENCE:
        raise UsageError(
            f"{type(model).__name__} computes something else when its residual stream is rotated (logits differ by "
            f"{float(difference):.1%}): compress.method neurons or two-sided takes this model"
        )
    sliced.put(model, layers, weights)


@torch.no_grad()
def bases_of(
    model: PreTrainedModel, stream: sliced.Stream, norms: Sequence[sliced.Norm], width: int, calibration: Calibration
) -> list[Float[Tensor, "D H"]]:
    """Orthonormal columns before each norm in float64 on the host, those of the largest components first."""
    walk, bases = calibration.walk(), list[Tensor]()

    def found(name: str, norm: sliced.Norm, layer: int | None) -> Float[Tensor, "D H"]:
        """The basis before a norm; `layer` is the one that runs to get there, None where the stream is there."""
        gram = Gram(hidden_size(model), cap=None, device=solver_device(walk.device))

        def add(x: Tensor) -> None:
            gram.add(norm.centred(x.float()).flatten(0, -2))

        if layer is None:
            for hidden in walk.hidden:
                add(hidden)
        else:
            handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: add(args[0]))
            for _ in walk.look(layer):
                pass
            handle.remove()
        return _principal(gram, width, name)

    for layer, pair in enumerate(zip(stream.branches[::2], stream.branches[1::2], strict=True)):
        with ExitStack() as hooks:
            for is_second, branch in enumerate(pair):
                norm = norms[len(bases)]
                basis = found(branch.norm, norm, layer if is_second else None)
                _project(model, branch.norm, branch.name, norm, basis, hooks)
                bases.append(basis.cpu())  # those of all layers may be too much for the device
            walk.pass_through(layer)
    return [*bases, found(stream.norm, norms[-1], None).cpu()]


def _principal(gram: Gram, width: int, name: str) -> Float[Tensor, "D H"]:
    gram.add_processes()
    mean = gram.mean()
    if not bool(torch.isfinite(mean).all()):
        raise DataError(f"what {name} reads is not finite: the model's weights are damaged")
    return torch.linalg.eigh(mean).eigenvectors.flip(1)[:, :width]


def _project(
    model: PreTrainedModel,
    norm_name: str,
    branch_name: str | None,
    norm: sliced.Norm,
    basis: Float[Tensor, "D H"],
    hooks: ExitStack,
) -> None:
    """Makes a dense model compute, until `hooks` is closed, as one whose stream has no other components from this norm
    on. The stream itself is out of reach: what it has to lose is taken from what the branch adds to it."""
    projection, moved = (basis @ basis.T).float(), list[Tensor]()

    def before(_: nn.Module, args: tuple[Tensor]) -> Tensor:
        (x,) = args
        with torch.autocast(x.device.type, enabled=False):
            left = (norm.centred(x.float()) @ projection.to(x.device)).to(x)
        moved[:] = [left - x]
        return left

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        return (output[0] + moved[0], *output[1:]) if isinstance(output, tuple) else output + moved[0]

    hooks.callback(model.get_submodule(norm_name).register_forward_pre_hook(before).remove)
    if branch_name is not None:
        hooks.callback(model.get_submodule(branch_name).register_forward_hook(after).remove)


@torch.no_grad()
def _logits(model: PreTrainedModel, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B L V"]:
    return model(tokens, use_cache=False).logits.float()
