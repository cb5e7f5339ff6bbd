"""Products in bfloat16 on processors that are faster at them, and nowhere else."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Outcome
from training import OPTIONS, data, state
from transformers import PreTrainedModel

from sparsekd import device, distillation, files
from sparsekd.device import place, rounded_factors, trains_in_bfloat16
from sparsekd.evaluate import measure
from sparsekd.models import logits_of
from sparsekd.run import directory, inspection
from sparsekd.teacher import Cache, fill

CPU = torch.device("cpu")
bfloat16 = pytest.mark.usefixtures("processor_with_bfloat16")


@pytest.fixture
def model(make_model: Any) -> PreTrainedModel:
    return make_model("llama")


@bfloat16
def test_the_choice_follows_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = place("cpu")
    assert (chosen.dtype, chosen.has_fast_products) == (torch.float32, True)
    assert "4.0 times as fast" in chosen.reason
    assert trains_in_bfloat16("auto", CPU)
    assert not trains_in_bfloat16("float32", CPU)
    assert not place("cpu", "float32").has_fast_products  # as asked
    monkeypatch.setattr(device, "bfloat16_gain", lambda: 1.1)  # a measurement contradicts the instructions
    assert not place("cpu").has_fast_products
    assert not trains_in_bfloat16("auto", CPU)


def test_a_processor_without_the_instructions_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The product could take a hundred times as long."""
    monkeypatch.setattr(device, "bfloat16_gain", lambda: pytest.fail("measured"))
    assert place("cpu").reason == "float32: the safe choice on cpu"
    assert not trains_in_bfloat16("auto", CPU)


def test_the_measurement_is_a_ratio_and_quick() -> None:
    assert 0.001 < device.bfloat16_gain() < 100
    assert device.bfloat16_gain() == device.bfloat16_gain()  # once a process


@bfloat16
def test_rounded_factors_round_no_sum_and_are_undone() -> None:
    a, b = torch.randn(64, 96), torch.randn(96, 80)
    before = a @ b
    with rounded_factors():
        found = a @ b
    assert torch.equal(a @ b, before)
    with pytest.raises(ZeroDivisionError), rounded_factors():
        raise ZeroDivisionError
    assert torch.equal(a @ b, before)
    rounded = a.bfloat16().double() @ b.bfloat16().double()
    error = min(float((found - exact).abs().max()) for exact in (rounded, before.double()))  # some do not round
    assert error < 1e-5 * float(rounded.abs().max())


@bfloat16
def test_logits_of_a_float32_model_keep_float32_sums(model: PreTrainedModel, blocks: torch.Tensor) -> None:
    with place("cpu").products():
        logits = logits_of(model, input_ids=blocks[:2])
        assert model(input_ids=blocks[:2]).logits.dtype == torch.bfloat16  # what it would be
    assert logits.dtype == torch.float32
    exact = model(input_ids=blocks[:2]).logits
    assert not torch.equal(logits, exact)
    torch.testing.assert_close(logits, exact, rtol=0, atol=0.05)


@bfloat16
def test_a_cache_says_how_its_pass_multiplied(model: PreTrainedModel, blocks: torch.Tensor, tmp_path: Path) -> None:
    by_id = {i: row.astype(np.int32) for i, row in enumerate(blocks.numpy())}
    made_from: Any = {"tokenizer_hash": "t", "corpus_fingerprint": "c", "top_k": 8}
    with place("cpu").products():
        fast = fill(model, tmp_path / "fast", by_id, **made_from)
    exact = fill(model, tmp_path / "exact", by_id, **made_from)
    assert fast is not None
    assert exact is not None
    assert fast.identity == exact.identity | {"products": "bfloat16"}
    a, b = (cache.read(0, by_id[0]).log_probs for cache in (fast, exact))
    assert not torch.equal(a, b)
    torch.testing.assert_close(a, b, rtol=0, atol=0.05)


@bfloat16
def test_perplexity_agrees_with_float32(model: PreTrainedModel, tokenizer: Any) -> None:
    text = "The quick brown fox jumps over the lazy dog while seven wizards mix potions. " * 8
    exact = measure({"m": model}, tokenizer, text, context=32, stride=16)["m"].perplexity.perplexity
    with place("cpu").products():
        found = measure({"m": model}, tokenizer, text, context=32, stride=16)["m"].perplexity.perplexity
    assert found != exact
    assert found == pytest.approx(exact, rel=2e-3)


def test_slow_bfloat16_is_warned_of(new_student: Any, blocks: torch.Tensor, cache: Cache) -> None:
    said: list[str] = []
    options = replace(OPTIONS, epochs=1, precision="bfloat16")
    distillation.train(new_student(), data(blocks, cache), options, say=said.append)
    (warning,) = said
    assert f"{device.bfloat16_gain():.2f} times as fast" in warning


@bfloat16
def test_auto_trains_in_bfloat16_where_it_is_faster(new_student: Any, blocks: torch.Tensor, cache: Cache) -> None:
    said: list[str] = []
    trained = {}
    for precision in ("auto", "bfloat16", "float32"):
        student = new_student()
        options: Any = replace(OPTIONS, epochs=1, precision=precision)
        distillation.train(student, data(blocks, cache), options, say=said.append)
        trained[precision] = state(student)
    assert not said
    assert all(torch.equal(trained["auto"][name], value) for name, value in trained["bfloat16"].items())
    assert any(not torch.equal(trained["auto"][name], value) for name, value in trained["float32"].items())


@bfloat16
def test_a_whole_run_in_bfloat16(
    sparsekd: Callable[..., Outcome], tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so, its inputs say so, and its figures are near those in float32."""
    auto = ("--set", "model.dtype=auto", "--set", "distill.precision=auto")
    found = sparsekd("run", tiny_recipe, "--out", tmp_path / "fast", "--json", *auto)
    assert found.code == 0, found.err
    assert "products in bfloat16: 4.0 times as fast" in found.err
    inputs = json.loads((tmp_path / "fast/round-01/cache/inputs.json").read_text())
    assert "float32, products in bfloat16" in json.dumps(inputs)
    exact = sparsekd(
        *["run", tiny_recipe, "--out", tmp_path / "exact", "--json"],
        *["--set", "model.dtype=float32", "--set", "distill.precision=float32"],
    )
    assert exact.code == 0, exact.err
    for name in ("dense", "compressed", "distilled"):
        a, b = (one.json["evaluation"]["models"][name]["held"]["perplexity"] for one in (found, exact))
        assert a != b
        assert a == pytest.approx(b, rel=0.01)
    again = sparsekd("run", tiny_recipe, "--out", tmp_path / "fast", "--resume", "--json", *auto)
    assert again.json["evaluation"] == found.json["evaluation"]
    monkeypatch.setattr(device, "bfloat16_gain", lambda: 0.9)  # the machine is busy
    files.remove(tmp_path / "fast/round-01/distilled")
    again = sparsekd("run", tiny_recipe, "--out", tmp_path / "fast", "--resume", "--json", *auto)
    assert again.code == 0, again.err
    assert again.json["evaluation"] == found.json["evaluation"]
    anew = sparsekd("run", tiny_recipe, "--out", tmp_path / "fast", "--fresh", "--json", *auto)
    assert anew.json["evaluation"]["models"] == exact.json["evaluation"]["models"]
    monkeypatch.setattr(device, "bfloat16_gain", lambda: 4.0)
    again = sparsekd("run", tiny_recipe, "--out", tmp_path / "fast", "--resume", "--json", *auto)
    assert again.json["evaluation"] == anew.json["evaluation"]


@pytest.mark.parametrize(
    ("vendor", "preloaded", "is_said"), [("AMD", "", 1), ("AMD", "/x/mkl.so", 0), ("Intel", "", 0)]
)
def test_a_processor_that_mkl_slows_down_is_told_once(
    sparsekd: Callable[..., Outcome],
    tiny_recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    vendor: str,
    preloaded: str,
    is_said: int,
) -> None:
    read = Path.read_text
    text = f"vendor_id : {'Authentic' if vendor == 'AMD' else 'Genuine'}{vendor}\nflags : fpu avx512f\n"
    monkeypatch.setattr(Path, "read_text", lambda p, *a, **k: text if str(p) == "/proc/cpuinfo" else read(p, *a, **k))
    for module in (directory, inspection):
        monkeypatch.setattr(module, "slow_kernels", device.slow_kernels)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setenv("LD_PRELOAD", preloaded)
    found = sparsekd("corpus", tiny_recipe, "--out", tmp_path / "run")
    assert found.code == 0
    assert found.err.count("MKL takes slow kernels on this AMD processor") == is_said
    assert ("slow kernels" in sparsekd("doctor").out) == bool(is_said)


@bfloat16
def test_float32_as_asked_holds_for_the_cut_too(
    sparsekd: Callable[..., Outcome], tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics, too, multiply as on a processor that is no faster in bfloat16; with `auto` they do not."""

    def cut(name: str, dtype: str) -> bytes:
        options = (
            "--set",
            f"model.dtype={dtype}",
            "--set",
            "compress.method=neurons",
            "--set",
            "compress.reduction=0.3",
        )
        found = sparsekd("compress", tiny_recipe, "--out", tmp_path / name, *options)
        assert found.code == 0, found.err
        return (tmp_path / name / "round-01/compressed/model/model.safetensors").read_bytes()

    asked, fast = cut("asked", "float32"), cut("fast", "auto")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert cut("slow", "auto") == asked
    assert fast != asked
