"""The residual stream: which modules write it and which read it, found by following a pass through the model.

The pass computes nothing, so a model without weights will do. It tells which tensor goes where: that the first layer
reads a sum of embeddings; that a layer adds to what it reads the output of one branch and then of another, each of
which reads the stream through a norm; and that one norm reads what the last layer hands on.

Shape letter: D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparsekd.errors import UsageError
from sparsekd.models.anatomy import find_layers, find_mlps, hidden_size
from sparsekd.models.copying import twin

_ADDS = {"add", "__add__", "__radd__"}


@dataclass(frozen=True)
class Branch:
    """Attention or the MLP of one layer: the module, the norm before it, and its linear layers that read what the norm
    gives and that writes what is added to the stream. Full names."""

    name: str
    norm: str
    reads: tuple[str, ...]
    writes: str


@dataclass(frozen=True)
class Stream:
    """What writes and reads the residual stream, by name; two branches a layer, in the order in which they run."""

    embeddings: tuple[str, ...]  # the first layer reads their sum
    branches: tuple[Branch, ...]
    norm: str  # the last one
    head: str

    @property
    def norms(self) -> list[str]:
        return [*(branch.norm for branch in self.branches), self.norm]


@dataclass(frozen=True)
class Norm:
    """`scale * x / sqrt(mean(x^2) + eps) + bias`, x being centred before where the norm is a LayerNorm."""

    scale: Float[Tensor, " D"]
    bias: Float[Tensor, " D"] | None
    eps: float
    is_centred: bool

    def centred(self, x: Float[Tensor, "*_ D"]) -> Float[Tensor, "*_ D"]:
        """What the norm leaves of a stream beside its length."""
        return x - x.mean(-1, keepdim=True) if self.is_centred else x

    def normed(self, x: Float[Tensor, "*_ D"]) -> Float[Tensor, "*_ D"]:
        """What the norm gives without scale and bias."""
        centred = self.centred(x)
        return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps)


def find_stream(model: PreTrainedModel) -> Stream:
    """Raises `UsageError` naming what is built otherwise."""
    copied = twin(model).eval()
    names: dict[nn.Module, str] = {module: name for name, module in copied.named_modules()}
    seen = _Pass(names)
    for module in copied.modules():
        module.register_forward_hook(seen.after, with_kwargs=True)
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), seen:
            copied(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    except Exception as error:  # a forward pass that looks at its numbers raises almost any class
        raise _refused(type(model).__name__, "computes what cannot be followed") from error
    layers = [names[layer] for layer in find_layers(copied)]
    branches = tuple(branch for layer in layers for branch in seen.branches(layer))
    for mlp, branch in zip(find_mlps(model), branches[1::2], strict=True):
        if (branch.reads, branch.writes) != (mlp.inputs, mlp.output):
            raise _refused(branch.name, "is no MLP")
    embeddings = seen.embeddings(seen.calls[layers[0]].read, layers[0])
    norm = seen.reader(seen.calls[layers[-1]].written, "", layers[-1])
    head: Any = copied.get_output_embeddings()
    return Stream(tuple(embeddings), branches, norm, names[head])


def norm_of(model: PreTrainedModel, name: str) -> Norm:
    """What the norm of that name computes, found by asking it; raises `UsageError` where that is something else."""
    module, eps, size = model.get_submodule(name), eps_of(model, name), hidden_size(model)
    signs = torch.tensor([1.0, -1.0], device=model.device).repeat(size)[:size]
    x = torch.randn(8, size, generator=torch.Generator().manual_seed(0)).to(signs)
    with torch.no_grad():
        over, under, moved, found = module(torch.cat([signs[None], -signs[None], x + 1, x])).split([1, 1, 8, 8])
        is_centred = bool(torch.allclose(moved, found, rtol=1e-3, atol=1e-3 * float(found.abs().max())))
        norm = Norm(torch.ones_like(signs), None, eps, is_centred)
        scale = (over - under)[0] / 2 / norm.normed(signs)
        norm = replace(norm, scale=scale, bias=(over + under)[0] / 2 if has_bias(model, name) else None)
    shift = 0 if norm.bias is None else norm.bias
    if not torch.allclose(norm.normed(x) * scale + shift, found, rtol=1e-3, atol=1e-3 * float(found.abs().max())):
        raise _refused(name, "is no RMSNorm and no LayerNorm")
    return norm


def eps_of(model: PreTrainedModel, name: str) -> float:
    """What keeps a norm from dividing by zero; raises `UsageError` for a module that has no such number."""
    module = model.get_submodule(name)
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(found, float):
        raise _refused(name, "is no norm with an eps")
    return found


def has_bias(model: PreTrainedModel, name: str) -> bool:
    """Whether a norm adds something to what it scales."""
    return getattr(model.get_submodule(name), "bias", None) is not None


def _refused(name: str, why: str) -> UsageError:
    return UsageError(
        f"{name} {why}: form sliced takes layers that add attention and an MLP, each after a norm, to what they read; "
        "compress.method neurons or two-sided takes this model"
    )


@dataclass(frozen=True)
class _Call:
    """What a module read and what it wrote, the first tensor of each."""

    module: nn.Module
    read: Tensor
    written: Tensor


class _Pass(TorchFunctionMode):
    """What each module read and wrote, by its name, and which tensors are sums of which. It holds all of them: none
    takes the place of another."""

    def __init__(self, names: dict[nn.Module, str]):
        super().__init__()
        self.calls: dict[str, _Call] = {}
        self._names = names
        self._sums: list[tuple[Tensor, tuple[Tensor, Tensor]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in _ADDS and len(args) == 2 and not kwargs:
            self._sums.append((found, args))
        return found

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        read = args[0] if args else kwargs.get("hidden_states")
        written = output[0] if isinstance(output, tuple) else output
        if isinstance(read, Tensor) and isinstance(written, Tensor) and written is not read:  # as dropout that is off
            self.calls[self._names[module]] = _Call(module, read, written)

    def reader(self, tensor: Tensor, inside: str, writer: str) -> str:
        """The one module that reads a tensor, of those whose names begin with `inside`."""
        readers = [name for name, call in self.calls.items() if call.read is tensor and name.startswith(inside)]
        outermost = [name for name in readers if not any(name.startswith(f"{other}.") for other in readers)]
        if len(outermost) != 1:
            raise _refused(writer, f"hands on what {' and '.join(outermost) or 'no module'} reads")
        return outermost[0]

    def embeddings(self, tensor: Tensor, layer: str) -> list[str]:
        """Those of which a tensor is the sum."""
        for name, call in self.calls.items():
            if call.written is tensor and isinstance(call.module, nn.Embedding):
                return [name]
        parts = next((parts for found, parts in self._sums if found is tensor), None)
        if parts is None:
            raise _refused(layer, "reads something else than a sum of embeddings")
        return [name for part in parts for name in self.embeddings(part, layer)]

    def branches(self, layer: str) -> list[Branch]:
        """The two branches of a layer."""
        start, end = self.calls[layer].read, self.calls[layer].written
        attention, middle = self._branch(layer, start)
        mlp, after = self._branch(layer, middle)
        if after is not end:
            raise _refused(mlp.name, "is not the last that its layer adds to the stream")
        return [attention, mlp]

    def _branch(self, layer: str, start: Tensor) -> tuple[Branch, Tensor]:
        """The branch that reads the stream `start`, and the stream after it."""
        norm = self.reader(start, f"{layer}.", layer)
        normed = self.calls[norm].written
        name = self.reader(normed, f"{layer}.", norm)
        written = self.calls[name].written
        inside = [
            (n, call)
            for n, call in self.calls.items()
            if n.startswith(f"{name}.") and isinstance(call.module, (nn.Linear, Conv1D))
        ]
        reads = tuple(n for n, call in inside if call.read is normed)
        writes = [n for n, call in inside if call.written is written]
        after = [
            found for found, (a, b) in self._sums if (a is start and b is written) or (a is written and b is start)
        ]
        if not reads or len(writes) != 1 or len(after) != 1:
            raise _refused(name, "does not add what a linear layer writes to what its norm reads")
        return Branch(name, norm, reads, writes[0]), after[0]
