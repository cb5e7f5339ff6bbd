"""Format `onnx`: the graph and its example say what PyTorch says; what is refused."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import made
from serving import MODELS, continued, example_says, serves_as_pytorch_does
from transformers import PreTrainedTokenizerFast

from sparsekd.errors import ResourceError, UsageError
from sparsekd.export import compare, format_named, sample
from sparsekd.export import onnx as format_

pytest.importorskip("onnx", reason='needs pip install "sparsekd[onnx]"')
import onnx_ir
import onnxruntime

from sparsekd.export import _onnx_weights, _tracing


@pytest.mark.parametrize("name", MODELS)
def test_it_says_what_pytorch_says(name: str, exported: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    model, folder, record = exported(name)
    assert record["comparison"]["largest_logit_difference"] < 1e-4
    assert record["comparison"]["agreement"] == 1
    assert example_says(folder) == continued(model, tokenizer)
    serves_as_pytorch_does(model, folder, "onnx")
    assert set(record["versions"]) >= {"torch", "transformers", *format_.PACKAGES}


def test_each_weight_is_stored_once(exported: Any) -> None:
    model, folder, _ = exported(MODELS[0])
    weights = sum(parameter.numel() for parameter in model.parameters()) * 4
    assert 0.98 * weights <= (folder / "model.onnx.data").stat().st_size < 1.1 * weights


@pytest.mark.parametrize(("weights", "size"), [("float16", 0.55), ("int8", 0.36), ("int4", 0.36)])
def test_smaller_numbers(
    weights: str, size: float, exported: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Of the graph that is there: an export is slow."""
    model, folder, _ = exported(MODELS[0])
    graph = onnx_ir.load(folder / "model.onnx")
    with _tracing.quiet():
        _onnx_weights.change(graph.graph, weights)
        onnx_ir.save(graph, tmp_path / "model.onnx", external_data="model.onnx.data")
    found = compare(model, format_.open(tmp_path), sample(model, tokenizer, None))
    assert (
        abs(found.perplexity / found.reference_perplexity - 1) < {"float16": 1e-3, "int8": 0.05, "int4": 0.5}[weights]
    )
    assert found.largest_logit_difference > 0
    before, after = (path.joinpath("model.onnx.data").stat().st_size for path in (folder, tmp_path))
    assert after < size * before
    assert not any(
        len(value.shape) == 2 and value.dtype == onnx_ir.DataType.FLOAT and value.name.endswith("weight")
        for value in graph.graph.initializers.values()
    )


def test_a_transformers_without_exporters(
    exported: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own exporter makes a graph that is called and answers alike."""
    model, folder, _ = exported(MODELS[0])
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "transformers.exporters" else find(name, *rest)
    )
    graph = _tracing.graph_of("onnx", model)
    usual = onnx_ir.load(folder / "model.onnx").graph
    assert {one.name for one in graph.graph.inputs} == {one.name for one in usual.inputs}
    assert [one.name for one in graph.graph.outputs] == [one.name for one in usual.outputs]
    onnx_ir.save(graph, tmp_path / "model.onnx", external_data="model.onnx.data")
    found = compare(model, format_.open(tmp_path), sample(model, tokenizer, None))
    assert found.largest_logit_difference < 1e-4
    assert found.agreement == 1


def test_logits_of_the_last_positions(exported: Any) -> None:
    """Of all where nobody says of how many."""
    model, folder, _ = exported(MODELS[0])
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    tokens = torch.tensor([[5, 6, 7, 8]])
    given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "position_ids": torch.arange(4)[None]}
    given |= {one.name: torch.zeros(1, one.shape[1], 0, one.shape[3]) for one in session.get_inputs()[3:]}
    with torch.no_grad():
        expected = model(tokens).logits
    for kept, positions in ({}, 4), ({_tracing.KEPT: torch.tensor(2)}, 2):
        feed = {name: tensor.numpy() for name, tensor in (given | kept).items()}
        logits = torch.from_numpy(session.run(["logits"], feed)[0])
        assert torch.allclose(logits, expected[:, -positions:], atol=1e-4)


def test_a_sequence_with_padding_before_it(exported: Any) -> None:
    """The mask is used: what is padded does not matter."""
    model, folder, _ = exported(MODELS[0])
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    tokens, mask = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1]])
    given = {"input_ids": tokens, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    past = {one.name: torch.zeros(1, one.shape[1], 0, one.shape[3]) for one in session.get_inputs()[3:]}
    logits = session.run(["logits"], {name: tensor.numpy() for name, tensor in (given | past).items()})[0]
    with torch.no_grad():
        expected = model(tokens[:, 2:]).logits
    assert torch.allclose(torch.from_numpy(logits[:, 2:]), expected, atol=1e-4)


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="keys and values of earlier tokens and nothing else, which qwen3_next"):
        format_.require(made("qwen3_next"))
    monkeypatch.setattr(format_, "PACKAGES", (*format_.PACKAGES, "not_there"))
    with pytest.raises(ResourceError, match=r'format onnx needs not_there: pip install "sparsekd\[onnx\]"'):
        format_named("onnx")
