"""Format `hf`: plain transformers opens the folder, with one short file where it cannot make the layers by itself."""

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import sparsekd as package
from sparsekd import export, models
from sparsekd.export import hf

ARCHITECTURES = ["llama", "qwen3", "phi3", "gpt2", "opt", "gpt_neox"]
ORDINARY = ["dense", "width", "depth", "mask", "depth+width"]
OWN = ["widths", "lowrank", "pivot"]
COMPOSED = ["depth+lowrank", "widths+lowrank", "widths+mask"]
SOURCE = export.Source("made here")


def test_plain_transformers_opens_every_form(
    make: Any, tokenizer: Any, logits: Any, opened_plainly: Any, tmp_path: Path
) -> None:
    expected = {}
    for architecture in ARCHITECTURES:
        for form in OWN if architecture != "llama" else ORDINARY + OWN + COMPOSED:
            model, folder = make(architecture, form), tmp_path / f"{architecture}-{form}"
            folder.mkdir()
            hf.require(model)
            hf.write(model, tokenizer, folder, "float32", SOURCE)
            expected[folder] = (type(model).__name__, form, logits(model))
    found = opened_plainly(*expected)
    assert found.keys() == expected.keys()
    for folder, (name, form, values) in expected.items():
        assert torch.equal(found[folder]["logits"], values), folder
        assert found[folder]["class"] == name
        has_code = form not in ORDINARY
        assert (folder / "modeling_sparsekd.py").exists() == has_code
        assert has_code == ("trust_remote_code" in (found[folder]["refused"] or "")), found[folder]["refused"]
    attention = {f"layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"}
    attention["layers.*.self_attn.o_proj"] = "rowwise"
    plain = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
    factors = {"gate_proj.up": "colwise", "up_proj.up": "colwise", "down_proj.down": "rowwise"}
    for form, mlp in (("dense", plain), ("widths", plain), ("lowrank", factors), ("pivot", {})):
        plan = attention | {f"layers.*.mlp.{name}": how for name, how in mlp.items()}
        assert found[tmp_path / f"llama-{form}"]["plan"] == plan, form


@pytest.mark.parametrize("form", OWN + COMPOSED)
def test_the_file_is_short_and_imports_torch_and_transformers_only(
    form: str, make: Any, tokenizer: Any, tmp_path: Path
) -> None:
    hf.write(make("llama", form), tokenizer, tmp_path, "float32", SOURCE)
    text = (tmp_path / "modeling_sparsekd.py").read_text()
    assert text.count("\n") < 90 and max(map(len, text.splitlines())) <= 120
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports}
    assert names <= {"torch", "transformers"}
    assert "quantization_config" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("form", ["dense", "lowrank", "widths"])
def test_sparsekd_opens_an_export_with_its_own_classes(
    form: str, make: Any, tokenizer: Any, logits: Any, tmp_path: Path
) -> None:
    model, folder = make("phi3", form), tmp_path / "out"
    folder.mkdir()
    hf.write(model, tokenizer, folder, "float32", SOURCE)
    loaded, _ = package.load(str(folder))  # trusts nothing
    assert type(loaded) is type(model) and torch.equal(logits(loaded), logits(model))
    assert models.forms.description_of(loaded) == models.forms.description_of(model)
    package.save(loaded, tokenizer, tmp_path / "again")
    assert "auto_map" not in (tmp_path / "again" / "config.json").read_text()


def test_weights_are_stored_as_in_the_checkpoint_or_as_is_asked(make: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = make("llama", "width")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    package.save(make("llama", "width"), tokenizer, tmp_path / "checkpoint", dtype=torch.bfloat16)
    checkpoint = export.Source(str(tmp_path / "checkpoint"))
    assert export.stored_as(checkpoint, "hf") == "bfloat16"
    for number_format in hf.WEIGHTS:
        folder = tmp_path / number_format
        folder.mkdir()
        hf.write(model, tokenizer, folder, number_format, SOURCE)
        assert models.checkpoint_dtype(str(folder)) == getattr(torch, number_format)
        with safe_open(folder / "model.safetensors", "pt") as file:
            stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        assert {value.dtype for value in stored.values()} == {getattr(torch, number_format)}
        assert stored.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
