"""Patterns 2:4 and 4:8 of the methods that leave zeros: the groups, what they need, training, and further rounds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cutting import section
from tiny import sharpened
from torch import Tensor
from training import OPTIONS, data
from transformers import PreTrainedModel

import sparsekd
from sparsekd import distillation
from sparsekd.compression import plan_for
from sparsekd.errors import UsageError
from sparsekd.models import find_mlps, linear_weight
from sparsekd.recipe import load_recipe

METHODS = ["magnitude", "wanda", "sparsegpt"]


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    names = [name for mlp in find_mlps(model) for name in mlp.matrices]
    return {name: linear_weight(model.get_submodule(name)).detach().clone() for name in names}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_half_of_every_group_is_zero(
    method: str, architecture: str, pattern: str, make_model: Any, blocks: Tensor
) -> None:
    model, options = make_model(architecture), {"method": method, "reduction": 0.5, "pattern": pattern}
    planned, before = plan_for(model, section(**options)), weights(model)
    after = weights(sparsekd.compress(model, blocks, **options))
    size = int(pattern[2])
    for name, weight in after.items():
        assert ((weight.unflatten(1, (-1, size)) == 0).sum(-1) == size // 2).all(), name
        if method == "magnitude":
            groups = before[name].abs().unflatten(1, (-1, size))
            least = groups.sort(-1).values[..., : size // 2].max(-1, keepdim=True).values
            assert torch.equal(weight, before[name].masked_fill((groups <= least).flatten(1), 0)), name
    assert {matrix.name: matrix.zeros for matrix in planned.matrices} == {
        name: int((weight == 0).sum()) for name, weight in after.items()
    }


@pytest.mark.parametrize("method", METHODS)
def test_training_keeps_the_pattern(
    method: str, make_model: Any, tokenizer: Any, blocks: Tensor, tmp_path: Path
) -> None:
    model = sharpened(make_model("llama"))
    cache = sparsekd.cache_teacher(model, tokenizer, blocks, tmp_path / "cache", top_k=8)
    student = sparsekd.compress(model, blocks, method=method, reduction=0.5, pattern="2:4")
    before = weights(student)
    options = replace(OPTIONS, alpha=1.0, weight_decay=0.1, learning_rate=1e-3)
    distillation.train(student, data(blocks, cache, (0, 1, 2, 3)), options)
    for name, weight in weights(student).items():
        assert torch.equal(weight == 0, before[name] == 0)
        assert torch.equal(weight != before[name], before[name] != 0)
    sparsekd.save(student, tokenizer, tmp_path / "student")
    loaded, _ = sparsekd.load(str(tmp_path / "student"))
    assert all(torch.equal(weight, weights(student)[name]) for name, weight in weights(loaded).items())


@pytest.mark.parametrize("method", METHODS)
def test_a_pattern_on_zeros_keeps_them_and_counts_them(method: str, make_model: Any, blocks: Tensor) -> None:
    model = sparsekd.compress(make_model("llama"), blocks, method="magnitude", reduction=0.3)
    before = weights(model)
    sparsekd.compress(model, blocks, method=method, reduction=0.5, pattern="2:4")
    after = weights(model)
    for name, weight in after.items():
        assert ((weight == 0) | (before[name] != 0)).all()
        assert ((weight.unflatten(1, (-1, 4)) == 0).sum(-1) >= 2).all()
    assert model.config.sparsekd["layers"] == {
        name: {"zeros": int((weight == 0).sum())} for name, weight in after.items()
    }


@pytest.mark.parametrize("method", METHODS)
def test_what_a_pattern_needs_is_said_in_one_line(method: str, make_model: Any, blocks: Tensor) -> None:
    with pytest.raises(
        UsageError, match=r"reduction is 0\.35, but pattern 2:4 removes 2 of every 4 weights: expected 0\.5"
    ):
        sparsekd.compress(make_model("llama"), blocks, method=method, reduction=0.35, pattern="2:4")
    odd = make_model("llama", intermediate_size=60)
    message = (
        r"layers\.0\.mlp\.down_proj has 60 inputs, which pattern 4:8 cannot divide: expected a multiple of 8; take"
    )
    with pytest.raises(UsageError, match=message):
        sparsekd.compress(odd, blocks, method=method, reduction=0.5, pattern="4:8")
    sparsekd.compress(odd, blocks, method=method, reduction=0.5, pattern="2:4")


@pytest.mark.parametrize("written", ["2:4", "'2:4'", '"2:4"'])
def test_yaml_needs_no_quotes(written: str, tmp_path: Path) -> None:
    """To YAML 1.1 it is 124, a number of base 60."""
    path = tmp_path / "recipe.yaml"
    path.write_text(f"preset: demo\ncompress: {{method: wanda, reduction: 0.5, wanda: {{pattern: {written}}}}}")
    for recipe in (
        load_recipe(str(path)),
        load_recipe("demo", ("compress.method=wanda", f"compress.wanda.pattern={written}")),
    ):
        assert recipe.compress.options.pattern == "2:4"
    with pytest.raises(UsageError, match=r"wanda\.pattern is '1:2': expected one of unstructured, 2:4, 4:8"):
        load_recipe(str(path), ("compress.wanda.pattern=1:2",))
