"""Fresh weights: those of a new model of the same class, in the shape that the model has."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsekd
from sparsekd import models
from sparsekd.errors import UsageError
from sparsekd.models import find_mlps, forms, initialise

SMALLER: list[dict[str, Any]] = [
    {"method": "svd"},
    {"method": "svd", "format": "lowrank"},
    {"method": "magnitude"},
    {"method": "neurons", "multiple": 4},  # a width a layer: a class of ours
    {"method": "activation", "multiple": 4},
]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3", "gpt2", "gpt_neox"])
def test_all_weights_are_as_in_a_new_model(architecture: str, make_model: Any) -> None:
    model, new = make_model(architecture, hidden_size=64), make_model(architecture, hidden_size=64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.rand_like(parameter) + 3)
    trained = {name: value.clone() for name, value in model.named_parameters()}
    head_is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    state = torch.get_rng_state()
    initialise(model, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert head_is_tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    for (name, value), expected in zip(model.named_parameters(), new.parameters(), strict=True):
        assert not torch.equal(value, trained[name])
        if expected.std() < 1e-6:  # norms and biases
            assert torch.equal(value, expected), name
        else:
            assert value.std().item() == pytest.approx(expected.std().item(), rel=0.1), name
            assert abs(value.mean()) < 0.3 * value.std()
    with torch.no_grad():
        logits = model(torch.arange(20)[None], use_cache=False).logits
    assert torch.isfinite(logits).all() and logits.std() < 1


def test_a_seed_draws_them(make_model: Any) -> None:
    hashes = []
    for seed in (1, 1, 2):
        model = make_model("llama")
        initialise(model, seed)
        hashes.append(models.weights_hash(model))
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("options", SMALLER, ids=str)
def test_a_compressed_model_keeps_its_shape(
    options: dict[str, Any], make_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    blocks = torch.randint(0, 300, (48, 32), generator=torch.Generator().manual_seed(1))
    model = sparsekd.compress(make_model("llama"), blocks, reduction=0.4, **options)
    before = copy.deepcopy(model)
    initialise(model, seed=1)
    assert forms.description_of(model) == forms.description_of(before) and type(model) is type(before)
    for (name, value), old in zip(model.named_parameters(), before.parameters(), strict=True):
        assert value.shape == old.shape
        assert torch.equal(value, old) == ("norm" in name), name
    sparsekd.save(model, tokenizer, tmp_path / "model")  # which checks the form
    loaded, _ = sparsekd.load(str(tmp_path / "model"))
    with torch.no_grad():
        assert torch.equal(loaded(blocks[:2]).logits, model(blocks[:2]).logits)
    if options["method"] == "magnitude":
        for name in (name for mlp in find_mlps(model) for name in mlp.matrices):
            assert torch.equal(model.get_submodule(name).weight == 0, before.get_submodule(name).weight == 0)


def test_the_library_starts_afresh_too(teacher: Any, cache: Any, blocks: torch.Tensor) -> None:
    fresh = copy.deepcopy(teacher)
    initialise(fresh, seed=5)
    student = copy.deepcopy(teacher)
    sparsekd.distill(student, blocks, cache, seed=5, start="fresh", learning_rate=1e-12)
    for (name, value), expected in zip(student.named_parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize("others", [{"train": "compressed"}, {"train": "lora"}, {"lr_scale": {"embeddings": 0}}])
def test_what_would_stay_random_is_refused(
    others: dict[str, Any], teacher: Any, cache: Any, blocks: torch.Tensor
) -> None:
    before = models.weights_hash(teacher)
    with pytest.raises(UsageError, match=r"distill.start is fresh: expected weights where a part does not train"):
        sparsekd.distill(teacher, blocks, cache, start="fresh", **others)
    assert models.weights_hash(teacher) == before
