"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774): weights are removed one input after the other, and those of the
inputs that follow make up for each as well as they can, on the text.

`H = E[x x^T]` of a matrix's inputs, with 0.01 of its mean diagonal on the diagonal, and U the upper Cholesky factor of
its inverse. Removing `w_ij` costs `w_ij^2 / u_jj^2`, and the row becomes `w_i - w_ij / u_jj * u_j`. Inputs go in blocks
of 128: the mask of a block is chosen when its turn comes, over all rows at once, or with a pattern N:M a group of M
inputs at a time. An input that is zero on all of the text loses its weights. The statistics of a decoder layer are
those of the model whose earlier layers are pruned already.

Shape letters: O output features, I input features, B inputs of a block.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from sparsekd.compression.plan import Plan
from sparsekd.compression.statistics import Gram, reads_input
from sparsekd.compression.walk import Walk
from sparsekd.compression.zeros import counted, least_important, zeros_and_group
from sparsekd.device import in_float64, solver_device
from sparsekd.errors import DataError
from sparsekd.models import MLP, find_mlps, forms, linear_weight, shape

BLOCK, DAMPING = 128, 0.01


@torch.no_grad()
def prune(model: PreTrainedModel, planned: Plan, walk: Walk, pattern: str) -> Plan:
    """Sets to zero what is `planned` of each matrix and updates the rest of it, in place, all or nothing. Returns the
    plan with the zeros that are there then: inputs that are zero on the text, and a masked model, may have more.

    Raises `DataError` naming a matrix whose inputs are not finite, or whose Hessian has no inverse.
    """
    share = {matrix.name: matrix.zeros / (matrix.in_features * matrix.out_features) for matrix in planned.matrices}
    is_masked = forms.description_of(model) is not None  # in a dense model a zero is a weight like any other
    old: dict[Tensor, Tensor] = {}
    try:
        for layer, mlp in enumerate(find_mlps(model)):
            for names, gram in zip((mlp.inputs, (mlp.output,)), _grams(model, mlp, walk, layer), strict=True):
                root, dead = inverse_root(gram, names[0])
                for name in names:
                    weight = linear_weight(model.get_submodule(name)).detach()
                    old[weight] = weight.clone()
                    exact = in_float64(weight).to(root.device)
                    stay = exact == 0 if is_masked else torch.zeros_like(exact, dtype=torch.bool)
                    weight.copy_(reconstructed(exact, stay, root, dead, share[name], pattern))
            walk.pass_through(layer)  # with the matrices as they are now
    except BaseException:
        for weight, before in old.items():
            weight.copy_(before)
        raise
    return counted(model, planned)


def _grams(model: PreTrainedModel, mlp: MLP, walk: Walk, layer: int) -> list[Float[Tensor, "I I"]]:
    """`E[x x^T]` of what the MLP reads, and of what its output matrix reads."""
    modules = [model.get_submodule(name) for name in (mlp.inputs[0], mlp.output)]
    grams = [Gram(shape(module)[0], cap=None, device=solver_device(walk.device)) for module in modules]
    pairs = zip(modules, grams, strict=True)
    handles = [module.register_forward_pre_hook(reads_input(gram, False)) for module, gram in pairs]
    try:
        for _ in walk.look(layer):
            pass
    finally:
        for handle in handles:
            handle.remove()
    for gram in grams:
        gram.add_processes()
    return [gram.mean() for gram in grams]


def inverse_root(gram: Float[Tensor, "I I"], name: str) -> tuple[Float[Tensor, "I I"], Bool[Tensor, " I"]]:
    """U, upper triangular with `U^T U = H^-1`, and which inputs are zero on all of the text; `gram` is overwritten.

    Raises `DataError` for the matrix of that name; nothing stands in for an inverse that there is not.
    """
    diagonal = gram.diagonal()
    if not bool(torch.isfinite(diagonal).all()):
        raise DataError(f"the inputs of {name} are not finite: the model's weights are damaged")
    dead = diagonal == 0
    diagonal += DAMPING * diagonal.mean()
    lower, failed = torch.linalg.cholesky_ex(gram)
    if not failed:
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return upper, dead
    raise DataError(
        f"the Hessian of {name} has no inverse"
        f"{': its inputs are zero on all of the text' if bool(dead.all()) else ''}; expected a trained model, or more "
        "and other text"
    )


def reconstructed(
    weight: Float[Tensor, "O I"],
    stay: Bool[Tensor, "O I"],
    root: Float[Tensor, "I I"],
    dead: Bool[Tensor, " I"],
    share: float,
    pattern: str,
) -> Float[Tensor, "O I"]:
    """The matrix with `share` of its weights zero, in each block alike, or in the pattern. Zeros that `stay` count as
    a part of it; there is one more in each block, and so many more as cost the same, as in the authors' code."""
    weight = weight.masked_fill(dead, 0)
    for first in range(0, weight.shape[1], BLOCK):
        inside = slice(first, first + BLOCK)
        errors = _reconstruct_block(weight[:, inside], stay[:, inside], root[inside, inside], share, pattern)
        weight[:, first + BLOCK :] -= errors @ root[inside, first + BLOCK :]
    return weight


def _reconstruct_block(
    block: Float[Tensor, "O B"],
    stay: Bool[Tensor, "O B"],
    root: Float[Tensor, "B B"],
    share: float,
    pattern: str,
) -> Float[Tensor, "O B"]:
    """Prunes the block, in place; returns `w_ij / u_jj` of the weights that went, by which the others change."""
    structured = zeros_and_group(pattern)
    pruned = stay.clone()
    if structured is None:
        costs = (block / root.diagonal()).square().masked_fill(stay, -1)
        pruned |= costs <= costs.flatten().sort().values[int(share * block.numel())]
    errors = torch.zeros_like(block)
    for column in range(block.shape[1]):
        if structured is not None and column % structured[1] == 0:
            group = slice(column, column + structured[1])
            costs = (block[:, group] / root.diagonal()[group]).square()
            left = block[:, group].masked_fill(stay[:, group], 0)
            pruned[:, group] |= least_important(left, costs, structured[0])
        errors[:, column] = block[:, column] * pruned[:, column] / root[column, column]
        block[:, column + 1 :] -= errors[:, column].outer(root[column, column + 1 :])
        block[:, column].masked_fill_(pruned[:, column], 0)
    return errors
