"""`magnitude`: the smallest weights of each matrix, and no text."""

from typing import Any

import pytest
import torch

import sparsekd
from sparsekd.models import find_mlps, linear_weight


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_smallest_weights_of_each_matrix_are_zero(architecture: str, make_model: Any) -> None:
    dense = make_model(architecture)
    pruned = sparsekd.compress(make_model(architecture), reduction=0.35, method="magnitude")
    for name in (name for mlp in find_mlps(dense) for name in mlp.matrices):
        before, after = (linear_weight(model.get_submodule(name)) for model in (dense, pruned))
        size = sum(value.numel() for value in dense.get_submodule(name).parameters())
        ordered = before.abs().flatten().sort().values
        count = -(-size * 35 // 100)  # rounded up: at least so many
        assert torch.equal(after, before.masked_fill(before.abs() < ordered[count], 0)), name
        assert int((after == 0).sum()) == count
