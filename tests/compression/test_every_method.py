"""What holds for every method on every architecture, and for every form from end to end. A new one is tested here by
being there.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsekd
from sparsekd import models, pipeline
from sparsekd.compression import plan_for
from sparsekd.compression.methods import method_named, names
from sparsekd.errors import DataError, UsageError
from sparsekd.models import forms
from sparsekd.recipe import load_recipe
from sparsekd.recipe.reading import compress_section
from sparsekd.run import dry_run, inspection

ARCHITECTURES = ["llama", "qwen3", "phi3", "gpt2", "gpt_neox"]
METHODS = {method_named(name).FORM: name for name in names()}  # one for each form that has any
# of tiny models
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"multiple": 2} for name in ("activation", "neurons", "taylor")},
    "slicegpt": {"multiple": 2},
    "leave-out": {"probe_tokens": 256},
}
NUM_LAYERS = {"depth": 5}  # two are too few to remove a share of
ONCE = {"sliced"}  # forms that are not made smaller again
REFUSED = {("slicegpt", "gpt_neox")}


def tokens() -> torch.Tensor:
    return torch.randint(0, 300, (40, 32), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", names())
def test_every_method_on_every_architecture(
    method: str, architecture: str, make_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    dense = make_model(architecture, num_hidden_layers=NUM_LAYERS.get(method_named(method).FORM, 2))
    options = {"method": method} | OPTIONS.get(method, {})
    if (method, architecture) in REFUSED:
        with pytest.raises(UsageError, match="takes this model"):
            sparsekd.compress(dense, tokens(), reduction=0.3, **options)
        return
    section = compress_section({"reduction": 0.3} | options)
    model = sparsekd.compress(copy.deepcopy(dense), tokens(), reduction=0.3, **options)
    again = sparsekd.compress(copy.deepcopy(dense), tokens(), reduction=0.3, **options)
    assert models.weights_hash(model) == models.weights_hash(again)
    description = forms.description_of(model)
    assert description is not None
    assert (description.form, description.method) == (method_named(method).FORM, method)
    assert description.dense == forms.dense_sizes(dense)
    planned = plan_for(dense, section)
    assert planned.mlp_reduction >= 0.3 - 1e-9
    with torch.no_grad():
        logits = model(tokens()).logits
        assert torch.isfinite(logits).all() and not torch.equal(logits, dense(tokens()).logits)
        sparsekd.save(model, tokenizer, tmp_path / "model")
        loaded, _ = sparsekd.load(str(tmp_path / "model"))
        assert torch.equal(loaded(tokens()).logits, logits)
    skeleton = models.skeleton(str(tmp_path / "model"))
    assert {name: value.shape for name, value in skeleton.state_dict().items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }
    is_once = method_named(method).FORM in ONCE
    with pytest.raises(UsageError, match="already: prune the dense" if is_once else "already: expected more"):
        sparsekd.compress(loaded, tokens(), reduction=0.2, **options)
    if is_once:
        return
    sparsekd.compress(loaded, tokens(), reduction=0.5, **options)
    further = forms.description_of(loaded)
    assert further is not None and further.dense == description.dense and further.reduction == 0.5


@pytest.mark.parametrize("form", METHODS)
def test_every_form_from_end_to_end(form: str, tiny_recipe: Path, make_model: Any, tmp_path: Path) -> None:
    make_model("llama", num_hidden_layers=NUM_LAYERS.get(form, 2)).save_pretrained(tmp_path / "llama")
    own = (f"compress.{METHODS[form]}.{name}={value}" for name, value in OPTIONS.get(METHODS[form], {}).items())
    rounds = "[0.4]" if form in ONCE else "[0.2,0.4]"
    settings = (f"compress.method={METHODS[form]}", *own, "compress.reduction=0.3", f"rounds={rounds}")
    recipe = load_recipe(str(tiny_recipe), (*settings, "distill.train=compressed"))
    estimated = dry_run.estimate(recipe)
    pipeline.run(recipe, tmp_path / "run")
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["compression"]["mlp_reduction"] >= 0.4 - 1e-9
    assert estimated.compression.mlp_reduction == pytest.approx(0.4, abs=0.05)
    last = tmp_path / ("run/round-01" if form in ONCE else "run/round-02")
    model, _ = sparsekd.load(str(last / "distilled/model"))
    facts = inspection.describe(last / "distilled/model")
    assert facts["kind"] == "model" and METHODS[form] in facts["compressed"]
    description = forms.description_of(model)
    assert description is not None and (description.form, description.reduction) == (form, 0.4)
    start, _ = sparsekd.load(str(last / "compressed/model"))
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, start.state_dict()[name])}
    assert moved  # the compressed layers, and nothing else
    assert {name.rpartition(".")[0] for name in moved} <= {
        inner for name in forms.trained(model) for inner, _ in model.get_submodule(name).named_modules(prefix=name)
    }


def test_a_description_of_the_first_version_is_read(make_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    for method, old in {
        "svd": lambda layers: {"format": "pivot", "ranks": {name: one["rank"] for name, one in layers.items()}},
        "wanda": lambda layers: {"format": "mask", "zeros": {name: one["zeros"] for name, one in layers.items()}},
    }.items():
        folder = tmp_path / method
        model = sparsekd.compress(make_model("llama"), tokens(), reduction=0.3, method=method)
        sparsekd.save(model, tokenizer, folder)
        (folder / "sparsekd.json").unlink()  # or its hashes would tell
        config = json.loads((folder / "config.json").read_text())
        now = config["sparsekd"]
        earlier = {"method": method, "allocation": "uniform", "reduction": 0.3} | old(now["layers"])
        (folder / "config.json").write_text(json.dumps(config | {"sparsekd": earlier}))
        loaded, _ = sparsekd.load(str(folder))
        assert loaded.config.sparsekd == now
        assert models.weights_hash(loaded) == models.weights_hash(model)


def test_a_description_of_a_later_version_is_named(make_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    sparsekd.save(sparsekd.compress(make_model("llama"), reduction=0.3, method="svd"), tokenizer, tmp_path / "model")
    (tmp_path / "model/sparsekd.json").unlink()
    path = tmp_path / "model/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"sparsekd": config["sparsekd"] | {"version": 9}}))
    with pytest.raises(DataError, match="has version 9, this sparsekd knows 2: install a newer one"):
        sparsekd.load(str(tmp_path / "model"))


def test_the_layers_that_an_export_hands_out_know_torch_alone() -> None:
    source = Path(forms._layers.__file__).read_text()
    imported = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert all(
        line.split()[1].partition(".")[0] in {"__future__", "collections", "functools", "typing", "torch"}
        for line in imported
    )
