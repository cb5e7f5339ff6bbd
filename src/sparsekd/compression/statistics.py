"""Second moments of activations and of loss gradients around every MLP, in one pass over the corpus.

Only hidden-size matrices: the input's `E[x x^T]` serves gate and up, the output's `E[y y^T]` serves down, so no
intermediate-size matrix ever appears (SmolLM2-135M: 80 MB instead of 323 MB, a quarter of the operations). Pruning
needs diagonals only (`input_norms`).

Curvature is the Fisher matrix of the KL to the teacher: `E[g g^T]` of the gradients g that cross-entropy against
labels drawn from the model's own distribution has at a layer's outputs. It is kept whole for the MLP's output and as
a diagonal for the intermediate-size outputs, where the whole matrix was measured to be no better (it is noisier).
The backward pass goes one layer at a time, from recorded layer inputs, so one layer's graph is all that is in memory;
no weight gradient is formed.

Passes multiply in bfloat16 where that is faster (`device.fast_products`). Sums are float64, where the model is, and on
the host for layers that visit a device in turn. In several processes each takes its share of the batches and the sums
are added.

Shape letters: N tokens, H hidden size, F features of a layer's output, B blocks, L positions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsekd.device import add_over_processes, fast_products, rank_and_count, rounded_factors, solver_device
from sparsekd.errors import DataError
from sparsekd.models import MLP, Layers, document_inputs, find_mlps, logits_of, shape

# Some models give the first position an activation hundreds of times larger than all others; in a sum of squares it
# alone would decide the top directions. A token counts with at most this multiple of the median norm. Gradients are
# heavy-tailed by nature and are left as they are: capping them was measured to hurt.
NORM_CAP = 4.0
TOKENS_PER_DIMENSION = 10  # fewer make a poor second moment: directions are then fitted to the sample


def weights_of(x: Float[Tensor, "N F"], cap: float = NORM_CAP) -> Float[Tensor, "N 1"]:
    """What a token counts times: 1, and less where its norm is more than `cap` times the median."""
    norm = x.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    return (cap * norm.median() / norm).clamp_max(1.0)


Labels = Callable[[Float[Tensor, "L V"], Int[Tensor, " L"]], Int[Tensor, " L"]]  # of a block's logits and tokens


@runtime_checkable
class Sum(Protocol):
    """What is summed over the text around an MLP."""

    def is_finite(self) -> Tensor: ...

    def add_processes(self) -> None: ...


class Gram:
    """Running sum of `x x^T`, or of its diagonal: products in the activations' precision, sums in float64."""

    def __init__(
        self,
        size: int,
        *,
        cap: float | None = NORM_CAP,
        diagonal: bool = False,
        device: torch.device | str = "cpu",
    ):
        self.cap, self.diagonal = cap, diagonal
        self.sum = torch.zeros(size if diagonal else (size, size), dtype=torch.float64, device=device)
        self.num_tokens = 0

    def add(self, x: Float[Tensor, "N F"]) -> None:
        x = x.detach().float()
        if self.cap is not None:
            x = x * weights_of(x, self.cap)
        with torch.autocast(x.device.type, enabled=False), rounded_factors():
            found = x.square().sum(0) if self.diagonal else x.T @ x
        self.sum += found.to(self.sum.device).double()  # one after the other: some devices have no float64
        self.num_tokens += len(x)

    def mean(self, device: torch.device | None = None) -> Tensor:
        """Where it was summed, or where what is on that `device` is solved."""
        mean = self.sum / max(1, self.num_tokens)
        return mean if device is None else mean.to(solver_device(device))

    def is_finite(self) -> Tensor:
        return torch.isfinite(self.sum if self.diagonal else self.sum.diagonal()).all()

    def add_processes(self) -> None:
        """Makes the sum that of all processes."""
        count = torch.tensor(float(self.num_tokens), dtype=torch.float64)
        for value in (self.sum, count):
            add_over_processes(value)
        self.num_tokens = int(count)


@dataclass
class Moments:
    """What was seen around one MLP; the curvature parts stay empty unless asked for."""

    input: Gram
    output: Gram  # without the output layer's bias
    output_curvature: Gram
    input_curvature: dict[str, Gram] = field(default_factory=dict)  # by matrix, diagonal

    def grams(self) -> list[Gram]:
        return [self.input, self.output, self.output_curvature, *self.input_curvature.values()]


def collect(
    model: PreTrainedModel,
    batches: Iterable[Int[Tensor, "_ _"]],
    *,
    curvature: bool = False,
    seed: int = 0,
    device: torch.device | None = None,
    separator: int | None = None,
) -> dict[MLP, Moments]:
    """Moments of each MLP over all tokens of `batches`; with `curvature`, labels are drawn with `seed`.

    With a `separator`, the token that ends a document, packed documents do not see each other. With a `device` other
    than the model's the weights stay where they are and each layer visits the device for its turn. Raises `DataError`
    naming the MLP when a number is not finite.
    """
    hidden, make = model.config.get_text_config().hidden_size, functools.partial(Gram, device=place(model, device))
    moments, handles = {}, []
    for mlp in find_mlps(model):
        seen = moments[mlp] = Moments(make(hidden), make(hidden), make(hidden, cap=None))
        first, last = model.get_submodule(mlp.inputs[0]), model.get_submodule(mlp.output)
        # with curvature each layer runs twice: to record, and then with a graph, when it counts
        handles.append(first.register_forward_pre_hook(reads_input(seen.input, curvature)))
        handles.append(last.register_forward_hook(_reads_output(seen.output, curvature)))
        if curvature:
            handles.append(last.register_forward_hook(_reads_gradient(seen.output_curvature)))
            for name in mlp.inputs:
                module = model.get_submodule(name)
                seen.input_curvature[name] = make(shape(module)[1], cap=None, diagonal=True)
                handles.append(module.register_forward_hook(_reads_gradient(seen.input_curvature[name])))
    grams = {mlp: seen.grams() for mlp, seen in moments.items()}
    try:
        run_all(model, batches, grams, device, separator, _drawn_with(seed) if curvature else None)
    finally:
        for handle in handles:
            handle.remove()
    return moments


def output_curvature(
    model: PreTrainedModel,
    batches: Iterable[Int[Tensor, "_ _"]],
    *,
    seed: int = 0,
    device: torch.device | None = None,
    separator: int | None = None,
) -> dict[MLP, Gram]:
    """The curvature at the output of each MLP alone; all else as in `collect`."""
    hidden = model.config.get_text_config().hidden_size
    found = {mlp: Gram(hidden, cap=None, device=place(model, device)) for mlp in find_mlps(model)}
    handles = [model.get_submodule(mlp.output).register_forward_hook(_reads_gradient(g)) for mlp, g in found.items()]
    try:
        run_all(model, batches, {mlp: [gram] for mlp, gram in found.items()}, device, separator, _drawn_with(seed))
    finally:
        for handle in handles:
            handle.remove()
    return found


def input_norms(
    model: PreTrainedModel,
    batches: Iterable[Int[Tensor, "_ _"]],
    *,
    device: torch.device | None = None,
    separator: int | None = None,
) -> dict[str, Float[Tensor, " F"]]:
    """The norm of every input of each MLP matrix over all tokens, `||x_j||_2`, by the matrix's name, on the host.

    `device`, `separator` and errors as in `collect`. No token is capped: the norms are those of the published method.
    """
    grams, norms, handles = {}, {}, []
    for mlp in find_mlps(model):
        modules = model.get_submodule(mlp.inputs[0]), model.get_submodule(mlp.output)
        grams[mlp] = [Gram(shape(module)[0], cap=None, diagonal=True) for module in modules]
        norms |= dict.fromkeys(mlp.inputs, grams[mlp][0]) | {mlp.output: grams[mlp][1]}
        for module, gram in zip(modules, grams[mlp], strict=True):
            handles.append(module.register_forward_pre_hook(reads_input(gram, False)))
    try:
        run_all(model, batches, grams, device, separator, None)
    finally:
        for handle in handles:
            handle.remove()
    return {name: gram.sum.sqrt() for name, gram in norms.items()}


def place(model: PreTrainedModel, device: torch.device | None) -> torch.device:
    """Where sums are kept."""
    is_whole = device is None or device == model.device  # else there may not be room for them
    return solver_device(model.device) if is_whole else torch.device("cpu")


def run_all(
    model: PreTrainedModel,
    batches: Iterable[Int[Tensor, "_ _"]],
    sums: Mapping[MLP, Sequence[Sum]],
    device: torch.device | None,
    separator: int | None,
    labels: Callable[[int, torch.device], Labels] | None,
) -> None:
    """This process's share of the batches through the model, whose hooks fill `sums`: forward, and backward too where a
    batch of that number has `labels`; then the sums of all processes."""
    layers, home = Layers(model), model.device
    device = device or home
    rank, world = rank_and_count()
    with _without_weight_gradients(model), all_but_layers_on(model, layers, device), fast_products(device):
        for number, batch in enumerate(batches):
            if number % world != rank:
                continue
            inputs = document_inputs(batch.to(device), separator)
            if labels is not None:
                _backward(model, layers, inputs, number, home, device, labels(number, device))
            else:
                with torch.inference_mode(), _in_turn(layers, home, device):
                    model.get_decoder()(**inputs, use_cache=False)
            _check_finite(sums, number, len(batch))
    for one in (one for of_mlp in sums.values() for one in of_mlp):
        one.add_processes()


def _check_finite(sums: Mapping[MLP, Sequence[Sum]], number: int, size: int) -> None:
    """Raises `DataError` naming the first MLP around which something was not finite, and the batch it came with."""
    found = [torch.stack([one.is_finite() for one in of_mlp]).all() for of_mlp in sums.values()]
    for mlp, is_finite in zip(sums, torch.stack(found).tolist(), strict=True):  # one wait for the device
        if not is_finite:
            raise _not_finite(f"activations around {mlp.output}", number, size)


def _not_finite(what: str, number: int, size: int) -> DataError:
    blocks = f"blocks {number * size} to {number * size + size - 1} of the statistics"
    return DataError(f"{what} are not finite in {blocks}: the model's weights are damaged")


def _backward(
    model: PreTrainedModel,
    layers: Layers,
    inputs: dict[str, Int[Tensor, "B L"]],
    number: int,
    home: torch.device,
    device: torch.device,
    labels: Labels,
) -> None:
    """One forward pass and one backward pass of cross-entropy against these labels."""

    def decoder() -> None:
        model.get_decoder()(**inputs, use_cache=False)

    with torch.no_grad(), _in_turn(layers, home, device):
        hidden = layers.record(decoder)
    are_finite = torch.stack([torch.isfinite(states).all() for states in hidden]).tolist()  # one wait for the device
    if not all(are_finite):
        layer = are_finite.index(False)
        raise _not_finite(f"hidden states before decoder layer {layer}", number, len(hidden[layer]))
    top = hidden.pop()
    gradient = torch.cat(
        [
            _output_gradient(model, layers, _row(inputs, row), last[None], len(hidden), labels)
            for row, last in enumerate(top)
        ]
    )
    if not bool(torch.isfinite(gradient).all()):
        raise DataError("the model's output is not finite: its weights are damaged")
    for layer in reversed(range(len(hidden))):
        below = hidden.pop(layer).requires_grad_()
        layers.modules[layer].to(device)
        _, output = layers.run(decoder, below, layer, layer + 1)
        output.backward(gradient)
        gradient = below.grad
        layers.modules[layer].to(home)


def _row(inputs: dict[str, Int[Tensor, "B L"]], number: int) -> dict[str, Int[Tensor, "1 L"]]:
    return {name: value[number : number + 1] for name, value in inputs.items()}


def _output_gradient(
    model: PreTrainedModel,
    layers: Layers,
    inputs: dict[str, Int[Tensor, "1 L"]],
    top: Float[Tensor, "1 L H"],
    depth: int,
    labels: Labels,
) -> Float[Tensor, "1 L H"]:
    """Gradient at the last layer's output; one block at a time, because logits are large."""
    top.requires_grad_()
    logits, _ = layers.run(lambda: logits_of(model, **inputs)[0].float(), top, depth)
    F.cross_entropy(logits, labels(logits, inputs["input_ids"][0]), reduction="sum").backward()
    assert top.grad is not None
    return top.grad


def _drawn_with(seed: int) -> Callable[[int, torch.device], Labels]:
    """Labels that the model draws; they depend on the batch's number alone, not on which process takes it."""

    def labels(number: int, device: torch.device) -> Labels:
        generator = torch.Generator(device if device.type == "cuda" else "cpu")
        generator.manual_seed((seed * 1_000_003 + number) % 2**64)
        return lambda logits, _: _drawn(logits, generator)

    return labels


@torch.no_grad()
def _drawn(logits: Float[Tensor, "L V"], generator: torch.Generator) -> Int[Tensor, " L"]:
    """Labels that the model itself would draw: where its cumulative distribution passes a uniform number. On a GPU,
    where the host does not wait for them, they are others than on a CPU."""
    cumulative = logits.softmax(-1).to(generator.device).cumsum(-1)
    wanted = torch.rand(len(logits), 1, generator=generator, device=generator.device) * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, wanted, right=True)[:, 0]  # right: never a token that has no probability
    return drawn.clamp_max(logits.shape[-1] - 1).to(logits.device)


@contextmanager
def _without_weight_gradients(model: PreTrainedModel) -> Iterator[None]:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def all_but_layers_on(model: PreTrainedModel, layers: Layers, device: torch.device) -> Iterator[None]:
    """Embedding, final norm and output projection stay on `device`; the decoder layers come and go."""
    home = model.device
    if device == home:
        yield
        return
    inside = {id(value) for layer in layers.modules for value in (*layer.parameters(), *layer.buffers())}
    try:
        for value in (*model.parameters(), *model.buffers()):
            if id(value) not in inside:
                value.data = value.data.to(device)
        yield
    finally:
        nn.Module.to(model, home)


@contextmanager
def _in_turn(layers: Layers, home: torch.device, device: torch.device) -> Iterator[None]:
    """Each decoder layer visits `device` for its forward pass."""

    def arrive(layer: nn.Module, _: object) -> None:
        layer.to(device)

    def leave(layer: nn.Module, *_: object) -> None:
        layer.to(home)

    handles = []
    for layer in layers.modules if device != home else []:
        handles.append(layer.register_forward_pre_hook(arrive))
        handles.append(layer.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def reads_input(gram: Gram, with_graph: bool) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A hook before a module, which adds what it reads to the sum; only passes with a graph count, or only others."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled() == with_graph:
            gram.add(args[0].flatten(0, -2))

    return hook


def _reads_output(gram: Gram, with_graph: bool) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        if torch.is_grad_enabled() == with_graph:
            bias = getattr(module, "bias", None)
            gram.add((output if bias is None else output - bias).flatten(0, -2))

    return hook


def _reads_gradient(gram: Gram) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gram.add(gradient.flatten(0, -2)))

    return hook
