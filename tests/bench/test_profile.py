"""Time by kind: every kind is found in every architecture, the parts add up, and the model is left as it was."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import made

import sparsekd
from sparsekd.bench import Shape, kinds, profile, speedup_bound
from sparsekd.bench.profiling import Subject, _by_kind, _together
from sparsekd.errors import UsageError
from sparsekd.evaluate import Serving, prompt


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "bloom", "phi3", "gemma2", "qwen3_next"])
def test_all_kinds_are_found(architecture: str) -> None:
    model = made(architecture).eval()
    found: dict[str, int] = {}
    for _, kind in kinds._parts(model):
        found[kind] = found.get(kind, 0) + 1
    assert found[kinds.MLP] >= 8 and found[kinds.ENDS] == 2 and found[kinds.NORMS] >= 8
    assert found[kinds.ATTENTION] >= 1 and found[kinds.PRODUCTS] >= 4


def test_a_range_ends_with_its_module_and_nothing_stays(make_model: Any) -> None:
    model, tokens = make_model("llama"), prompt(2, 16)
    before = Serving(model).prefill(tokens)
    with torch.profiler.profile() as profiler, kinds.marked(model):
        assert torch.equal(Serving(model).prefill(tokens), before)
    events = list(profiler.events())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    by_kind = {kind: [e for e in events if e.name == f"sparsekd: {kind}"] for kind in kinds.KINDS}
    assert len(by_kind[kinds.MLP]) == 6 and len(by_kind[kinds.PRODUCTS]) == 8 and len(by_kind[kinds.ENDS]) == 2
    assert len(by_kind[kinds.ATTENTION]) == 2 and len(by_kind[kinds.NORMS]) == 5
    products = [e for e in events if e.name in ("aten::mm", "aten::addmm")]
    assert {kinds._kind(e) for e in products} == {kinds.MLP, kinds.PRODUCTS, kinds.ENDS}
    assert all(kinds._kind(e) == kinds.ATTENTION for e in events if "scaled_dot_product" in e.name)
    assert all(kinds._kind(e) == kinds.ELEMENTWISE for e in events if e.name == "aten::silu")
    parts = kinds.seconds_by_kind(events, on_gpu=False)
    operators = sum(e.self_cpu_time_total for e in events if "::" in e.name) / 1e6
    assert sum(parts.values()) == pytest.approx(operators) and min(parts.values()) > 0


@pytest.mark.parametrize("decode", [False, True])
def test_the_bound_is_that_of_the_shares(decode: bool, make_model: Any) -> None:
    dense = make_model("llama")
    small = sparsekd.compress(make_model("llama"), reduction=0.5, method="svd")
    attentions = ["sdpa"] if decode else ["sdpa", "eager"]
    found = profile({"dense": dense, "small": small}, Shape(2, 16), attentions, decode=decode)
    expected = [(name, attention) for attention in attentions for name in ("dense", "small")]
    assert [(row["model"], row["attention"]) for row in found["rows"]] == expected
    for row in found["rows"]:
        assert sum(row["shares"].values()) == pytest.approx(1)
        assert sum(row["seconds_by_kind"].values()) >= row["seconds"]["median"] * (1 - 1e-9)
    (bound,) = found["bounds"]
    assert bound["mlp_share"] == found["rows"][0]["shares"][kinds.MLP]
    assert bound["arithmetic_reduction"] == pytest.approx(2, rel=0.15)
    assert bound["bound"] == speedup_bound(bound["mlp_share"], bound["arithmetic_reduction"])
    assert bound["achieved"] == bound["times_as_fast"]["median"] / bound["bound"]
    by_kind = found["by_kind"]["small"]
    assert set(by_kind) == set(kinds.KINDS) - {kinds.OVERHEAD}
    assert all(one["low"] <= one["median"] <= one["high"] and one["confidence"] >= 0.95 for one in by_kind.values())
    if decode:
        assert not found["together"]
        return
    (together,) = found["together"]
    assert (together["from"], together["to"]) == ("eager", "sdpa")
    assert together["product"] == together["attention_alone"]["median"] * together["compression_alone"]["median"]
    assert dense.config._attn_implementation == "eager"  # the last that was asked for


def test_ratios_by_kind_are_of_pairs() -> None:
    """The machine becomes slower for both; a kind that one of the two has not is left out."""
    dense, small = Subject("dense", "sdpa"), Subject("small", "sdpa")
    parts = {
        dense: [{kinds.MLP: load * 6.0, kinds.NORMS: 1.0} for load in range(1, 7)],
        small: [{kinds.MLP: load * 2.0, kinds.NORMS: 0.0} for load in range(1, 7)],
    }
    found = _by_kind(parts, dense, small)
    assert found == {kinds.MLP: {"median": 3.0, "low": 3.0, "high": 3.0, "confidence": 1 - 2 / 64}}


def test_both_gains_are_set_against_their_product() -> None:
    """In each turn: 2 times as fast by attention, 3 times by compression, and 4 times by both."""
    names = [Subject(name, attention) for attention in ("eager", "sdpa") for name in ("dense", "small")]
    seconds = {
        name: [load * taken for load in range(1, 7)] for name, taken in zip(names, (12.0, 4.0, 6.0, 3.0), strict=True)
    }
    parts = {name: [{kinds.ATTENTION: taken}] * 6 for name, taken in zip(names, (5.0, 5.0, 1.0, 1.0), strict=True)}
    found = _together(seconds, parts, "dense", "small", "eager", "sdpa")
    assert (found["product"], found["both"]["median"], found["attention_itself"]["median"]) == (6, 4, 5)
    assert found["both_to_product"]["low"] == found["both_to_product"]["high"] == pytest.approx(4 / 6)


def test_the_command(sparsekd: Any, small_model: Any, model_folder: Any, tmp_path: Path) -> None:
    folder, _ = small_model
    dense = model_folder("llama")
    arguments = ("profile", dense, folder, "--batch", 2, "--length", 16, "--attention", "sdpa")
    printed = sparsekd(*arguments, "--out", tmp_path / "out", "--trace", tmp_path / "traces")
    assert printed.code == 0, printed
    assert "Where the time of a prompt goes; 2 x 16, float32, cpu" in printed.out
    assert "Amdahl's bound" in printed.out and "profiler_start" not in printed.err
    found = json.loads((tmp_path / "out" / "profile.json").read_text())
    picture = (tmp_path / "out" / "profile.svg").read_text()
    assert len(found["rows"]) == 2
    assert all(f"<!-- {kind} -->" in picture for kind in kinds.KINDS)
    traces = sorted((tmp_path / "traces").iterdir())
    assert len(traces) == 2 and traces[0].name.startswith("1-") and traces[0].name.endswith("-sdpa.json")
    names = {event.get("name") for event in json.loads(traces[0].read_text())["traceEvents"]}
    assert {"sparsekd: attention", "aten::mm"} <= names


def test_a_folder_of_traces_that_is_there_is_kept(refused: Any, model_folder: Any, tmp_path: Path) -> None:
    folder = tmp_path / "traces"
    folder.mkdir()
    line = refused("profile", model_folder("llama"), "--trace", folder, error=UsageError)
    assert f"{folder} is there already: choose another folder for --trace, or remove it" in line
