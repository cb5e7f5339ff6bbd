"""What a model is made of: its MLPs and decoder layers, found by shape and structure, never by name.

With hidden size h and any intermediate size i, sibling linear layers outside attention that are exactly {h->i, i->h},
{h->i, h->i, i->h} or {h->2i, i->h} form an MLP. Each decoder layer must have one: what else has these shapes is a part
of a mixture of experts, which is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparsekd.errors import UsageError

# what configs call the width of an MLP
_WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_inner")
# what attention modules know and MLPs do not
_HEADS = ("head_dim", "head_size", "num_heads", "num_attention_heads", "n_head", "n_heads")


@dataclass(frozen=True)
class MLP:
    """The linear layers of one MLP: `inputs` read the hidden state (gate and up, or a fused pair, or one), `output`
    writes it. Names are the modules' full names in the model."""

    inputs: tuple[str, ...]
    output: str

    @property
    def matrices(self) -> tuple[str, ...]:
        return (*self.inputs, self.output)


def find_mlps(model: PreTrainedModel) -> list[MLP]:
    """The MLPs in depth order. A config that names their width must agree, but for one that neurons were removed from,
    whose module knows its `dense_neurons`.

    Raises `UsageError` if none is found, or if they are a part only of what a mixture of experts has in their place.
    """
    mlps = _shaped_like_mlps(model)
    if not mlps:
        hidden = hidden_size(model)
        raise UsageError(
            f"no MLP found in {type(model).__name__}: expected sibling linear layers {hidden}->i (one, two, or one of "
            f"twice the width) and i->{hidden}; mixtures of experts are not supported"
        )
    _require_dense(model, mlps)
    return mlps


def hidden_size(model: PreTrainedModel) -> int:
    """The width of the residual stream; in a sliced model it is less than the config says, which has the dense one."""
    sliced: Any = getattr(model.get_input_embeddings(), "sliced", None)
    return sliced["hidden"] if sliced else model.config.get_text_config().hidden_size


def find_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers that hold the MLPs, in depth order; raises `UsageError` if they are not one list of layers."""
    return list(model.get_submodule(list_of_layers(model)).children())


def list_of_layers(model: PreTrainedModel) -> str:
    """The name of the list of decoder layers; errors as in `find_layers`."""
    lists = _lists_of_layers(model, find_mlps(model))
    if len(lists) > 1:
        raise UsageError(f"the MLPs of {type(model).__name__} are not in one list of decoder layers")
    return next(iter(lists[0])).rpartition(".")[0]


def _shaped_like_mlps(model: PreTrainedModel) -> list[MLP]:
    config, hidden = model.config.get_text_config(), hidden_size(model)
    sizes: set[int] = set()
    for known in (getattr(config, key, None) for key in _WIDTHS):  # one number, or one for each layer
        sizes |= {known} if isinstance(known, int) else set(known or ())
    found = []
    for name, module in model.named_modules():
        if is_attention(module):  # it can have the shapes of an MLP
            continue
        prefix = f"{name}." if name else ""
        linears = {prefix + key: shape(child) for key, child in module.named_children() if is_linear(child)}
        writing = [key for key, (_, o) in linears.items() if o == hidden]
        if not writing:
            continue
        output = writing[-1]  # where the intermediate size equals the hidden one, the last of them writes
        inputs = tuple(key for key, (i, _) in linears.items() if i == hidden and key != output)
        if len(linears) != len(inputs) + 1:
            continue
        intermediate = linears[output][0]
        known = hasattr(module, "dense_neurons") or intermediate in sizes
        if not known and (sizes or intermediate == hidden):
            continue
        widths = [linears[key][1] for key in inputs]
        if widths not in ([intermediate], [intermediate, intermediate], [2 * intermediate]):
            continue
        found.append(MLP(inputs, output))
    return found


def _lists_of_layers(model: PreTrainedModel, mlps: list[MLP]) -> list[dict[str, nn.Module]]:
    """The outermost lists of modules that hold the MLPs, each as its layers by name; one list in most models."""
    found, outputs = [], {mlp.output for mlp in mlps}
    for name, module in model.named_modules():  # a list comes before those inside it
        held = {output for output in outputs if output.startswith(f"{name}.")}
        if isinstance(module, nn.ModuleList) and held:
            found.append({f"{name}.{number}": layer for number, layer in enumerate(module)})
            outputs -= held
    if outputs:
        raise UsageError(f"{type(model).__name__}: {min(outputs)} is in no list of decoder layers")
    return found


def _require_dense(model: PreTrainedModel, mlps: list[MLP]) -> None:
    """Raises `UsageError` unless each decoder layer has one MLP and no sign of experts: of a mixture, dense layers and
    shared experts are found, and a fraction of their parameters is a far smaller one of the model's."""
    layers = {name: layer for layers in _lists_of_layers(model, mlps) for name, layer in layers.items()}
    held = {name: [mlp for mlp in mlps if mlp.output.startswith(f"{name}.")] for name in layers}
    num_single = sum(len(inside) == 1 for inside in held.values())
    reasons = (_sign_of_experts(name, layer, held[name]) for name, layer in layers.items())
    reason = next(filter(None, reasons), None)
    if num_single < len(layers) or reason is not None:
        raise UsageError(
            f"{type(model).__name__}: {num_single} of {len(layers)} decoder layers have one MLP"
            f"{f', and {reason}' if reason else ''}; expected dense layers with one MLP each; mixtures of experts are "
            "not supported"
        )


def _sign_of_experts(name: str, layer: nn.Module, mlps: list[MLP]) -> str | None:
    """What in a decoder layer only a mixture of experts has: experts in a stack, experts in a list, or a matrix beside
    those of an MLP, which routes."""
    for path, module in _outside_attention(layer, name):
        dimensions = [parameter.ndim for parameter in module.parameters(recurse=False)]
        if max(dimensions, default=0) > 2 and not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return f"{path} holds a stack of matrices"
        if isinstance(module, nn.ModuleList) and any(is_linear(inner) for inner in module.modules()):
            return f"{path} is a list of modules with matrices"
    for mlp in mlps:
        branch = mlp.output.removeprefix(f"{name}.").partition(".")[0]
        own = tuple(f"{matrix}." for matrix in mlp.matrices)
        for path, parameter in layer.get_submodule(branch).named_parameters(f"{name}.{branch}"):
            if parameter.ndim > 1 and not path.startswith(own):
                return f"{path} is beside the matrices of an MLP"
    return None


def _outside_attention(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """A decoder layer and all in it but attention, by name; the layer itself may know of heads."""
    yield name, module
    for key, child in module.named_children():
        if not is_attention(child):
            yield from _outside_attention(child, f"{name}.{key}")


def is_attention(module: nn.Module) -> bool:
    """Whether a module knows of attention heads."""
    return any(hasattr(module, attribute) for attribute in _HEADS)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer: a dense one, or a compressed one, which has factors."""
    return isinstance(module, (nn.Linear, Conv1D)) or hasattr(module, "factors")


def shape(module: nn.Module) -> tuple[int, int]:
    """(input features, output features) of a dense or compressed linear layer."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return module.in_features, module.out_features  # type: ignore[return-value]


def linear_weight(module: nn.Module) -> Tensor:
    """The matrix of a linear layer as output x input: of a dense one without a copy, of a compressed one multiplied."""
    if hasattr(module, "factors"):
        compressed: Any = module
        up, down = compressed.factors()
        return up @ down
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.T if isinstance(module, Conv1D) else weight


def output_weight(model: PreTrainedModel) -> Tensor:
    """The vocab x hidden matrix that turns hidden states into logits."""
    head: Any = model.get_output_embeddings()
    return head.weight


def num_parameters(module: nn.Module) -> int:
    """Parameters of a module, tied ones counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


def mlp_parameters(model: PreTrainedModel) -> int:
    """Parameters of all MLPs, biases too."""
    return sum(num_parameters(model.get_submodule(name)) for mlp in find_mlps(model) for name in mlp.matrices)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` where `model.get_submodule(name)` is."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
