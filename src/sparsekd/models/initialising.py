"""A model with the weights that training starts from, as if it had never been trained."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from transformers import PreTrainedModel

from sparsekd.models import forms


def initialise(model: PreTrainedModel, seed: int) -> None:
    """Gives all weights the values that transformers makes a new model of this class with, drawn with `seed`, in place.
    Of a compressed model form and shapes stay, and so do its zeros.

    On a GPU, where they are drawn by its own generator, they are others than on a CPU.
    """
    guard, everything = forms.guard(model), itertools.chain(model.modules(), model.parameters(), model.buffers())
    for one in everything:
        marked: Any = one
        marked._is_hf_initialized = False  # transformers leaves alone what it has read or initialised before
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.init_weights()
    if guard is not None:
        guard.restore()
