"""The layers that stand in place of a model's dense ones, and how they are made again from its config. Knows torch and
nothing else, so that an export can hand this file out as it is.

Form `width` has linear layers like the base's, of other sizes; the kinds below are of form `lowrank`. All of them write
the same matrices, W = up @ down of rank R. `two-factors` stores both factors. The pivot kinds store R rows or R columns
of W itself and the others as combinations of them, which saves R^2 numbers, so full rank costs exactly the dense layer
(PIFA, Zhao et al., arXiv 2502.18139). Their pivots are the first R rows or columns: the neurons of an MLP can be put in
any order, so one that suits all its matrices is written into the weights and costs nothing when the model runs.

Form `sliced` has a narrower residual stream in another basis before each norm, as SliceGPT (arXiv 2401.15024). The add
is in the forward pass of the base's layer, which stays as it is: a norm hands on, beside what it is asked for, what the
change of basis moves the stream by, and the attention or MLP that reads it adds that to what it writes.

Shape letters: I input features, O output features, R rank, B blocks, L positions, H width of the stream.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class CompressedLinear(nn.Module):
    """What the kinds share: the sizes, and the factors whose product is the matrix."""

    kind: str

    def __init__(self, in_features: int, out_features: int, rank: int):
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank

    def factors(self) -> tuple[Tensor, Tensor]:
        """`up`, `down` whose product is the layer's matrix."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class LowRankLinear(CompressedLinear):
    """`y = up(down(x))`: `R (I + O)` weights. The bias, if any, belongs to `up`."""

    kind = "two-factors"

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = False):
        super().__init__(in_features, out_features, rank)
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=bias)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.up.weight, self.down.weight

    @property
    def bias(self) -> Tensor | None:
        return self.up.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


class RowPivotLinear(CompressedLinear):
    """The first R outputs are computed, `z = pivots(x)`, the others are combinations of them: `y = [z, rest(z)]`.

    `R (I + O) - R^2` weights. For the matrices that write an MLP's neurons (gate, up).
    """

    kind = "row-pivot"

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = False):
        super().__init__(in_features, out_features, rank)
        self.pivots = nn.Linear(in_features, rank, bias=False)
        self.rest = nn.Linear(rank, out_features - rank, bias=False)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def factors(self) -> tuple[Tensor, Tensor]:
        return torch.cat([_identity(self.rest.weight, self.rank), self.rest.weight]), self.pivots.weight

    def forward(self, x: Tensor) -> Tensor:
        if self._writes_in_place(x):
            y = x.new_empty(*x.shape[:-1], self.out_features)
            flat = y.view(-1, self.out_features)
            z, others = flat[:, : self.rank], flat[:, self.rank :]
            torch.mm(x.reshape(-1, self.in_features), self.pivots.weight.T, out=z)
            torch.mm(z, self.rest.weight.T, out=others)
        else:
            z = self.pivots(x)
            y = torch.cat([z, self.rest(z)], dim=-1)
        return y if self.bias is None else y + self.bias

    def _writes_in_place(self, x: Tensor) -> bool:
        """Whether both products may be written straight to their place: no autograd, no tracer, no adapter around, and
        no hook that would have to see the inner layers called, as off-loading's, which fetches their weights."""
        plain = _is_plain(self.pivots) and _is_plain(self.rest)
        traced = torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)
        return plain and not traced and not torch.is_grad_enabled()


class ColumnPivotLinear(CompressedLinear):
    """The first R inputs are taken as they are, the others only add to them: `y = pivots(x[:R] + rest(x[R:]))`.

    `R (I + O) - R^2` weights. For the matrix that reads an MLP's neurons (down).
    """

    kind = "column-pivot"

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = False):
        super().__init__(in_features, out_features, rank)
        self.rest = nn.Linear(in_features - rank, rank, bias=False)
        self.pivots = nn.Linear(rank, out_features, bias=bias)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.pivots.weight, torch.cat([_identity(self.rest.weight, self.rank), self.rest.weight], dim=1)

    @property
    def bias(self) -> Tensor | None:
        return self.pivots.bias

    def forward(self, x: Tensor) -> Tensor:
        # not two slices: each would have a gradient of the whole width, zeros but for its part
        pivots, others = x.split([self.rank, self.in_features - self.rank], dim=-1)
        return self.pivots(pivots + self.rest(others))


KINDS: dict[str, type[CompressedLinear]] = {
    layer.kind: layer for layer in (LowRankLinear, RowPivotLinear, ColumnPivotLinear)
}


class SlicedNorm(nn.Module):
    """RMS norm without weight; the mean is that of the `dense` model's features, those that are gone being zero."""

    def __init__(self, dense: int, eps: float):
        super().__init__()
        self.dense, self.eps = dense, eps

    def forward(self, x: Tensor) -> Any:
        exact = x.float()
        return (exact * torch.rsqrt(exact.square().sum(-1, keepdim=True) / self.dense + self.eps)).to(x.dtype)


class ShortcutNorm(SlicedNorm):
    """The norm before attention or an MLP, of a stream (B x L x H) whose basis changes there: `(norm(x), xS - x)` with
    the matrix S of the published method's shortcut."""

    def __init__(self, width: int, dense: int, eps: float):
        super().__init__(dense, eps)
        self.shortcut = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), self.shortcut(x) - x


class AfterShortcut:
    """Mixed into the class of attention or an MLP: reads what a `ShortcutNorm` gives. Added to `x`, what it returns is
    the shortcut's `xS` and what the base computes."""

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        normed, moved = hidden_states
        base: Any = super()
        found = base.forward(normed, *args, **kwargs)
        return (found[0] + moved, *found[1:]) if isinstance(found, tuple) else found + moved


@functools.cache
def after_shortcut(base: Any) -> Any:
    """The class of `base` modules that read what a `ShortcutNorm` gives."""
    return type(f"Sliced{base.__name__}", (AfterShortcut, base), {})


class Rebuilt:
    """Mixed into the class of a base model: after the base's own `__init__`, puts in the layers that `config.sparsekd`
    describes."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        base: Any = super()
        base.__init__(config, *args, **kwargs)
        rebuild(self, config.sparsekd["layers"])


def rebuild(model: Any, layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Replaces what is named in `layers`, linear layers by ones of their kind and rank, MLPs by ones of their width,
    what writes and reads the residual stream by what does so in a sliced one. The weights are not set yet."""
    for name, described in layers.items():
        if "neurons" in described:
            _narrow(model.get_submodule(name), described)
            continue
        if "hidden" in described:
            _slice(model, name, described)
            continue
        if "kind" not in described:  # zeros, or fewer layers, which need no modules of ours
            continue
        dense = model.get_submodule(name)
        inputs, outputs = _sizes(dense)
        layer: Any = KINDS[described["kind"]]
        replaced = layer(inputs, outputs, described["rank"], dense.bias is not None)
        _put(model, name, replaced)


def _slice(model: Any, name: str, described: Mapping[str, Any]) -> None:
    """Makes an embedding, the last norm, the output projection, or attention or an MLP with the norm before it, fit a
    residual stream of so many features."""
    hidden, module = described["hidden"], model.get_submodule(name)
    if isinstance(module, nn.Embedding):
        module.weight = nn.Parameter(torch.empty(len(module.weight), hidden))
        module.embedding_dim = hidden
    elif "reads" in described:
        for read in described["reads"]:
            _put(model, read, _reading(model.get_submodule(read), hidden, described["bias"]))
        writes = model.get_submodule(described["writes"])
        _put(model, described["writes"], resized(writes, _sizes(writes)[0], hidden))
        _put(model, described["norm"], ShortcutNorm(hidden, described["dense"], described["eps"]))
        module.__class__ = after_shortcut(type(module))
    elif "eps" in described:
        _put(model, name, SlicedNorm(described["dense"], described["eps"]))
    else:
        _put(model, name, _reading(module, hidden, described["bias"]))
    model.get_submodule(name).sliced = described


def _reading(layer: Any, in_features: int, has_bias: bool) -> Any:
    """A linear layer like this one that reads so many features, and has a bias where the norm before it had one."""
    made = resized(layer, in_features, _sizes(layer)[1])
    if has_bias and made.bias is None:
        made.bias = nn.Parameter(torch.zeros(_sizes(layer)[1]))
    return made


def _put(model: Any, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _narrow(mlp: Any, described: Mapping[str, Any]) -> None:
    """Gives the matrices in a module so many neurons."""
    *inputs, output = (mlp.get_submodule(child) for child in described["matrices"])
    width, hidden = _sizes(output)
    narrow = [resized(layer, hidden, _sizes(layer)[1] // width * described["neurons"]) for layer in inputs]
    narrow.append(resized(output, described["neurons"], hidden))
    for child, layer in zip(described["matrices"], narrow, strict=True):
        setattr(mlp, child, layer)
    mlp.dense_neurons = described["dense"]


def resized(layer: Any, in_features: int, out_features: int) -> Any:
    """A linear layer like this one, of other sizes, whose weights are not set yet."""
    if isinstance(layer, nn.Linear):
        return type(layer)(in_features, out_features, bias=layer.bias is not None)
    return type(layer)(out_features, in_features)  # transformers' Conv1D, which has a bias


def _sizes(layer: Any) -> tuple[int, int]:
    """Input and output features; transformers' Conv1D keeps its matrix the other way round."""
    outputs, inputs = layer.weight.shape if isinstance(layer, nn.Linear) else reversed(layer.weight.shape)
    return inputs, outputs


def _is_plain(layer: nn.Module) -> bool:
    """Whether calling a layer is nothing but its product; accelerate puts its hooks in place of `forward`."""
    hooked = layer._forward_pre_hooks or layer._forward_hooks or "forward" in vars(layer)
    return type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and not hooked


def _identity(like: Tensor, size: int) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)
