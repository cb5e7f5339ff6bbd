"""Format `openvino`: the graph and its example say what PyTorch says; what is refused."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from architectures import made
from serving import MODELS, continued, example_says, serves_as_pytorch_does
from transformers import PreTrainedTokenizerFast

from sparsekd.errors import ResourceError, UsageError
from sparsekd.export import compare, format_named, sample
from sparsekd.export import openvino as format_

if importlib.util.find_spec("openvino") is None:
    pytest.skip('needs pip install "sparsekd[openvino]"', allow_module_level=True)
openvino = format_._openvino()  # a plain import reports itself over the network


@pytest.mark.parametrize("name", MODELS[1:2])  # the graphs are those of format onnx, which is tried with all
def test_it_says_what_pytorch_says(name: str, exported: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    model, folder, record = exported(name)
    assert record["comparison"]["largest_logit_difference"] < 1e-4
    assert record["comparison"]["agreement"] == 1
    assert example_says(folder) == continued(model, tokenizer)
    serves_as_pytorch_does(model, folder, "openvino")
    assert set(record["versions"]) >= {"torch", "transformers", *format_.PACKAGES}


@pytest.mark.parametrize(("weights", "size"), [("int8", 0.3), ("int4", 0.3)])
def test_smaller_numbers(
    weights: str, size: float, exported: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Of the graph that is there: an export is slow."""
    model, folder, _ = exported(MODELS[1])
    graph = format_._compressed(openvino.Core().read_model(folder / format_.FILE), weights)
    openvino.save_model(graph, tmp_path / format_.FILE, compress_to_fp16=False)
    found = compare(model, format_.open(tmp_path), sample(model, tokenizer, None))
    assert abs(found.perplexity / found.reference_perplexity - 1) < {"int8": 0.05, "int4": 0.5}[weights]
    assert found.largest_logit_difference > 0
    before, after = (path.joinpath("openvino_model.bin").stat().st_size for path in (folder, tmp_path))
    assert after < size * before


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="keys and values of earlier tokens and nothing else, which qwen3_next"):
        format_.require(made("qwen3_next"))
    monkeypatch.setattr(format_, "PACKAGES", (*format_.PACKAGES, "not_there"))
    with pytest.raises(ResourceError, match=r'format openvino needs not_there: pip install "sparsekd\[openvino\]"'):
        format_named("openvino")


def test_nothing_is_reported_over_the_network(tmp_path: Path) -> None:
    code = (
        "from sparsekd.export import openvino; openvino._openvino(); import nncf, os; "
        "from openvino_telemetry import Telemetry; print(Telemetry().consent, os.environ.get('CI'))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "CI"} | {"HOME": str(tmp_path)}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["False", "None"] and not list(tmp_path.rglob("*cid*"))
