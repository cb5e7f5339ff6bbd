"""Several steps, one after the other: what each finds, what is left, and orders that cannot be."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import sparsekd
from sparsekd import models, pipeline
from sparsekd.compression import plan_for
from sparsekd.compression.methods import method_named
from sparsekd.errors import UsageError
from sparsekd.models import forms
from sparsekd.recipe import as_yaml, load_recipe
from sparsekd.recipe.reading import compress_section
from sparsekd.run import dry_run, inspection

OWN: dict[str, dict[str, Any]] = {"neurons": {"multiple": 2}}
REMOVED = {"shortgpt": 0.5}
STEPS = [("neurons", "two-sided"), ("neurons", "wanda"), ("shortgpt", "neurons"), ("shortgpt", "two-sided")]


def tokens() -> torch.Tensor:
    return torch.randint(0, 300, (40, 32), generator=torch.Generator().manual_seed(1))


def of(*methods: str) -> dict[str, Any]:
    """Each removes a quarter of what it finds, or one of two layers."""
    *first, last = ({"method": name, "reduction": REMOVED.get(name, 0.25)} | OWN.get(name, {}) for name in methods)
    return last | {"first": first}


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize("steps", STEPS, ids="+".join)
def test_a_model_of_several_forms(
    steps: tuple[str, ...], architecture: str, make_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    dense = make_model(architecture)
    model = sparsekd.compress(copy.deepcopy(dense), tokens(), **of(*steps))
    described = forms.description_of(model)
    assert described is not None and described.dense == forms.dense_sizes(dense)
    assert (described.form, described.method) == ("+".join(method_named(one).FORM for one in steps), "+".join(steps))
    removed = 1 - 0.75 * (1 - REMOVED.get(steps[0], 0.25))
    assert described.reduction == pytest.approx(removed)
    planned = plan_for(dense, compress_section(of(*steps)))
    assert planned.mlp_reduction == pytest.approx(removed, abs=0.05)
    assert planned.model_parameters_before == models.num_parameters(dense)
    if "wanda" not in steps:
        assert planned.model_parameters_after == pytest.approx(models.num_parameters(model), rel=0.02)
    with torch.no_grad():
        logits = model(tokens()).logits
        sparsekd.save(model, tokenizer, tmp_path / "model")
        loaded, _ = sparsekd.load(str(tmp_path / "model"))
        assert torch.equal(loaded(tokens()).logits, logits)
        merged = forms.merged(model)
        assert type(merged) is type(dense)
        torch.testing.assert_close(merged(tokens()).logits, logits, rtol=1e-4, atol=1e-4)
    assert (forms.guard(model) is not None) == ("wanda" in steps)
    skeleton = models.skeleton(str(tmp_path / "model"))
    assert {name: value.shape for name, value in skeleton.state_dict().items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }
    with pytest.raises(UsageError, match=f"compress.method is {steps[0]}, but"):
        sparsekd.compress(loaded, tokens(), method=steps[0], reduction=0.9)


def test_each_step_sees_what_the_one_before_it_left(make_model: Any) -> None:
    dense = make_model("llama")
    together = sparsekd.compress(copy.deepcopy(dense), tokens(), **of("neurons", "wanda"))
    apart = sparsekd.compress(copy.deepcopy(dense), tokens(), **of("neurons"))
    del apart.config.sparsekd  # as a dense model of this shape
    sparsekd.compress(apart, tokens(), **of("wanda"))
    assert models.weights_hash(together) == models.weights_hash(apart)


def test_from_end_to_end(tiny_recipe: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load(tiny_recipe.read_text())
    recipe["compress"] = [
        {"method": "neurons", "reduction": 0.25, "neurons": {"multiple": 2}},
        {"method": "wanda", "reduction": 0.25},
    ]
    tiny_recipe.write_text(yaml.safe_dump(recipe))
    read = load_recipe(str(tiny_recipe))
    (tmp_path / "again.yaml").write_text(as_yaml(read))
    assert load_recipe(str(tmp_path / "again.yaml")) == read
    estimated = dry_run.estimate(read).compression
    pipeline.run(read, tmp_path / "run")
    found = json.loads((tmp_path / "run/report.json").read_text())["compression"]
    assert found["mlp_reduction"] == pytest.approx(estimated.mlp_reduction, abs=0.05)
    facts = inspection.describe(tmp_path / "run/round-01/distilled/model")
    assert facts["compressed"] == "neurons+wanda, 44% of the MLP parameters removed" and facts["format"] == "width+mask"
    before, _ = sparsekd.load(str(tmp_path / "run/round-01/compressed/model"))
    after, _ = sparsekd.load(str(tmp_path / "run/round-01/distilled/model"))
    zeros = [
        (one == 0).sum()
        for model in (before, after)
        for one in (model.get_submodule(name).weight for name in sorted(forms.trained(model)))
    ]
    assert zeros[: len(zeros) // 2] == zeros[len(zeros) // 2 :] and sum(zeros) > 0


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (("wanda", "neurons"), "neurons (form width) cannot come after wanda (form mask): the order is depth, then"),
        (("neurons", "neurons"), "neurons (form width) cannot come after neurons (form width)"),
        (("two-sided", "wanda"), "wanda (form mask) cannot come after two-sided (form lowrank)"),
    ],
)
def test_an_order_that_cannot_be(steps: tuple[str, ...], said: str, make_model: Any) -> None:
    with pytest.raises(UsageError) as raised:
        sparsekd.compress(make_model("llama"), tokens(), **of(*steps))
    assert said in str(raised.value)


def test_bad_input(make_model: Any, tiny_recipe: Path) -> None:
    model = sparsekd.compress(make_model("llama"), tokens(), **of("wanda"))
    with pytest.raises(UsageError, match="several steps, and the model is mask already: give the dense model"):
        sparsekd.compress(model, tokens(), **of("neurons", "wanda"))
    recipe = yaml.safe_load(tiny_recipe.read_text())
    for steps, said in (
        ([], r"compress is \[\]: expected a section, or a list of sections"),
        (["neurons"], "expected a section, or a list of sections"),
        ([of("neurons"), of("wanda")], None),
        ([{"method": "nonsense"}, of("wanda")], "compress.method is 'nonsense'"),
        ([{"reduction": 2}, of("wanda")], "compress.reduction is 2.0: expected"),
    ):
        tiny_recipe.write_text(yaml.safe_dump(recipe | {"compress": steps}))
        if said is None:
            with pytest.raises(UsageError, match="rounds prune by one method, but compress has several steps"):
                load_recipe(str(tiny_recipe), ("rounds=[0.2,0.4]",))
        else:
            with pytest.raises(UsageError, match=said):
                load_recipe(str(tiny_recipe))
