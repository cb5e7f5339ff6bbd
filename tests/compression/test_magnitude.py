"""`magnitude`: the smallest weights of each row, and no text."""

from typing import Any

import torch

import sparsekd
from sparsekd.models import find_mlps, linear_weight


def test_the_smallest_weights_of_each_row_are_zero(make_model: Any) -> None:
    dense = make_model("llama")
    pruned = sparsekd.compress(make_model("llama"), reduction=0.5, method="magnitude")
    for name in (name for mlp in find_mlps(dense) for name in mlp.matrices):
        before, after = (linear_weight(model.get_submodule(name)) for model in (dense, pruned))
        for row, left in zip(before, after, strict=True):
            smallest = row.abs().sort().indices[: len(row) // 2]
            assert torch.equal((left == 0).nonzero()[:, 0], smallest.sort().values)
            assert torch.equal(left[left != 0], row[left != 0])
