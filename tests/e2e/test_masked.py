"""The whole path with zeros instead of low rank."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparsekd import models, pipeline
from sparsekd.models.anatomy import find_mlps, linear_weight
from sparsekd.recipe import load_recipe
from sparsekd.run import dry_run


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_pruned_model_goes_the_whole_path(
    architecture: str, tiny_recipe: Path, model_folder: Any, tmp_path: Path
) -> None:
    settings = ("compress.method=wanda", "compress.format=mask", "compress.reduction=0.5", "distill.weight_decay=0.1")
    recipe = load_recipe(str(tiny_recipe), (*settings, f"model.name={model_folder(architecture)}"))
    planned = dry_run.estimate(recipe)
    pipeline.run(recipe, tmp_path / "run")
    masks = []
    for stage in ("compressed", "distilled"):
        folder = tmp_path / "run/round-01" / stage / "model"
        model, _ = models.load(str(folder))
        plain = AutoModelForCausalLM.from_pretrained(folder)
        names = [name for mlp in find_mlps(plain) for name in mlp.matrices]
        masks.append([linear_weight(plain.get_submodule(name)) == 0 for name in names])
        zeros = [matrix.zeros for matrix in planned.compression.matrices]
        assert [int(mask.sum()) for mask in masks[-1]] == zeros
        assert models.num_parameters(model) == planned.compression.model_parameters_stored
    assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))
