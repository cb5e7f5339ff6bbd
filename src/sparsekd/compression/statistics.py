"""Second moments of activations and of loss gradients around every MLP, in one pass over the corpus.

Only hidden-size matrices: the input's `E[x x^T]` serves gate and up, the output's `E[y y^T]` serves down, so no
intermediate-size matrix ever appears (SmolLM2-135M: 80 MB instead of 323 MB, a quarter of the operations).

Curvature is the Fisher matrix of the KL to the teacher: `E[g g^T]` of the gradients g that cross-entropy against
labels drawn from the model's own distribution has at a layer's outputs. It is kept whole for the MLP's output and as
a diagonal for the intermediate-size outputs. The backward pass goes through activations only, no weight gradient is
formed, so it costs as much as a forward pass.

Shape letters: N tokens, H hidden size, F features of a layer's output, B blocks, L positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsekd.errors import DataError
from sparsekd.models import MLP, find_mlps, shape

# Some models give the first position an activation hundreds of times larger than all others; in a sum of squares it
# alone would decide the top directions. A token counts with at most this multiple of the median norm.
NORM_CAP = 4.0


class Gram:
    """Running sum of `x x^T`, or of its diagonal: products in the activations' precision, sums in float64."""

    def __init__(self, size: int, diagonal: bool = False):
        self.diagonal = diagonal
        self.sum = torch.zeros(size if diagonal else (size, size), dtype=torch.float64)
        self.num_tokens = 0

    def add(self, x: Float[Tensor, "N F"]) -> None:
        x = x.detach().float()
        norm = x.norm(dim=-1, keepdim=True)
        cap = NORM_CAP * norm.median().clamp_min(1e-30)
        x = x * (cap / norm.clamp_min(1e-30)).clamp_max(1.0)
        self.sum += (x.square().sum(0) if self.diagonal else x.T @ x).double().cpu()
        self.num_tokens += len(x)

    def mean(self) -> Tensor:
        return self.sum / max(1, self.num_tokens)


@dataclass
class Moments:
    """What was seen around one MLP; the curvature parts stay empty unless asked for."""

    input: Gram
    output: Gram  # without the output layer's bias
    output_curvature: Gram
    input_curvature: dict[str, Gram] = field(default_factory=dict)  # by matrix, diagonal

    def is_finite(self) -> bool:
        grams = [self.input, self.output, self.output_curvature, *self.input_curvature.values()]
        return all(bool(torch.isfinite(gram.sum).all()) for gram in grams)


def collect(
    model: PreTrainedModel, batches: Iterable[Int[Tensor, "_ _"]], *, curvature: bool = False, seed: int = 0
) -> dict[MLP, Moments]:
    """Moments of each MLP over all tokens of `batches`; with `curvature`, labels are drawn with `seed`.

    Raises `DataError` naming the MLP when a number is not finite.
    """
    hidden = model.config.get_text_config().hidden_size
    moments, handles = {}, []
    for mlp in find_mlps(model):
        seen = moments[mlp] = Moments(Gram(hidden), Gram(hidden), Gram(hidden))
        first, last = model.get_submodule(mlp.inputs[0]), model.get_submodule(mlp.output)
        handles.append(first.register_forward_pre_hook(_reads_input(seen.input)))
        handles.append(last.register_forward_hook(_reads_output(seen.output)))
        if curvature:
            handles.append(last.register_forward_hook(_reads_gradient(seen.output_curvature)))
            for name in mlp.inputs:
                module = model.get_submodule(name)
                seen.input_curvature[name] = Gram(shape(module)[1], diagonal=True)
                handles.append(module.register_forward_hook(_reads_gradient(seen.input_curvature[name])))
    generator = torch.Generator().manual_seed(seed)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        for batch in batches:
            if curvature:
                _backward(model, batch.to(model.device), generator)
            else:
                with torch.inference_mode():
                    model.get_decoder()(input_ids=batch.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)
    for mlp, seen in moments.items():
        if not seen.is_finite():
            raise DataError(f"activations around {mlp.output} are not finite: the model's weights are damaged")
    return moments


def _backward(model: PreTrainedModel, tokens: Int[Tensor, "B L"], generator: torch.Generator) -> None:
    """One forward pass and one backward pass of cross-entropy against labels that the model itself would draw."""
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits.flatten(0, 1).float()
    probabilities = logits.detach().softmax(-1).cpu()
    if not bool(torch.isfinite(probabilities).all()):
        raise DataError("the model's output is not finite: its weights are damaged")
    labels = torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(logits.device)
    F.cross_entropy(logits, labels, reduction="sum").backward()


def _reads_input(gram: Gram) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda _, args: gram.add(args[0].flatten(0, -2))


def _reads_output(gram: Gram) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        bias = getattr(module, "bias", None)
        gram.add((output if bias is None else output - bias).flatten(0, -2))

    return hook


def _reads_gradient(gram: Gram) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        output.register_hook(lambda gradient: gram.add(gradient.flatten(0, -2)))

    return hook
