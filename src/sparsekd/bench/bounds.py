"""What the best could be: the arithmetic that is left, the bytes that are read, and what follows for the speed."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from sparsekd.models import find_mlps


def speedup_bound(share: float, reduction: float) -> float:
    """How many times as fast the whole is at most when a part that takes `share` of the time becomes `reduction` times
    as fast and nothing else changes: `1 / (1 - share + share / reduction)` (Amdahl, "Validity of the single processor
    approach to achieving large scale computing capabilities", AFIPS 1967)."""
    return 1 / (1 - share + share / reduction)


def mlp_multiplications(model: PreTrainedModel) -> int:
    """Of each token in the products of the MLPs: one for each number in their matrices, or in the factors of these.
    Zeros that are stored are multiplied with."""
    return sum(_numbers(model.get_submodule(name)) for mlp in find_mlps(model) for name in mlp.matrices)


def bytes_per_step(model: PreTrainedModel, bytes_per_number: int) -> int:
    """Weights that each step of decoding reads: all but the input embedding's, of which it reads a row."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    numbers = {id(p): p.numel() for p in model.parameters()}
    if embedding is not None and (head is None or head.weight is not embedding.weight):
        numbers.pop(id(embedding.weight), None)
    return bytes_per_number * sum(numbers.values())


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim > 1)
