"""Format `dense`: the base's own architecture, whatever the form was."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sparsekd import export, models
from sparsekd.export import dense
from sparsekd.models import forms
from sparsekd.models.forms import width

FORMS = ["dense", "width", "widths", "depth", "mask", "lowrank", "pivot", "depth+lowrank", "widths+lowrank"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("architecture", ["llama", "phi3", "gpt2", "opt", "gpt_neox", "bloom"])
def test_what_is_merged_computes_the_same(architecture: str, form: str, make: Any, logits: Any) -> None:
    model = make(architecture, form)
    before, kept = logits(model), models.weights_hash(model)
    merged = forms.merged(model)
    assert type(merged) is type(make(architecture, "dense")) and forms.description_of(merged) is None
    assert torch.allclose(logits(merged), before, atol=1e-4)
    assert models.weights_hash(model) == kept and not model.training
    again = type(merged)(merged.config)  # of the config alone
    assert {key: one.shape for key, one in again.state_dict().items()} == {
        key: one.shape for key, one in merged.state_dict().items()
    }
    if form == "widths":
        widths = {width.num_neurons(merged, mlp) for mlp in models.find_mlps(merged)}
        whole = width.num_neurons(make(architecture, "dense"), models.find_mlps(merged)[0])
        assert widths == {whole if architecture == "bloom" else 64}  # bloom's config has no key for it


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("dense", "as large and as fast as the dense model"),
        ("width", None),
        ("depth", None),
        ("lowrank", "merged back: neither smaller nor faster than the dense model"),
        ("widths", "ordinary matrices of one width: "),
        ("depth+width", None),
    ],
)
def test_it_says_what_merging_costs(form: str, said: str | None, make: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = make("gpt2", form)  # MLPs of 128 neurons; 33 is filled up to 64
    notes = dense.write(model, tokenizer, tmp_path, "float32", export.Source("made here"))
    assert len(notes) == (said is not None) and all(note.startswith(str(said)) for note in notes)
    assert not (tmp_path / "modeling_sparsekd.py").exists()
    assert "sparsekd" not in (tmp_path / "config.json").read_text() or form in ("width", "depth")
