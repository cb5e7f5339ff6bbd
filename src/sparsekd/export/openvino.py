"""Format `openvino`: openvino_model.xml and .bin, made of the graph of format `onnx`, and how to use it.

The cache goes in and out, as it does there. A model that keeps its cache itself, which transformers' OpenVINOExporter
makes, ends OpenVINO 2026.4.1 with a division by zero on SmolLM2's first prompt where it computes in bfloat16, as it
does by default on processors that have it.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsekd.export import _tracing
from sparsekd.export.checking import Runtime, Tolerance
from sparsekd.export.source import Source

WEIGHTS: Mapping[str, Tolerance] = {
    "float32": Tolerance(0.01, 0.995, 1e-4),
    "float16": Tolerance(3.0, 0.99, 0.005),
    "int8": Tolerance(30.0, 0.9, 0.03),
    "int4": Tolerance(100.0, 0.5, 0.6),
}
PACKAGES = ("onnx", "onnxscript", "openvino", "nncf")
FILE = "openvino_model.xml"
_GROUP = 32  # weights in a row that share a scale, with 4 bits


def require(model: PreTrainedModel) -> None:
    """Raises `UsageError` for a model whose cache is not keys and values."""
    _tracing.require("openvino", model)


def write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, weights: str, source: Source
) -> list[str]:
    """The graph and what stands beside it."""
    import onnx_ir

    openvino = _openvino()
    graph = _tracing.graph_of("openvino", model)
    with tempfile.TemporaryDirectory(dir=folder) as passing:
        onnx_ir.save(graph, Path(passing) / "model.onnx", external_data="model.onnx.data")
        converted = _compressed(openvino.convert_model(Path(passing) / "model.onnx"), weights)
        openvino.save_model(converted, folder / FILE, compress_to_fp16=weights == "float16")
    _tracing.write_surroundings(model, tokenizer, folder, "generate_openvino.py")
    return []


def _openvino() -> Any:
    """OpenVINO, which reports its use over the network, as NNCF does with it, unless it is imported in a CI job."""
    before = os.environ.get("CI")
    os.environ["CI"] = "true"
    try:
        import openvino
    finally:
        if before is None:
            del os.environ["CI"]
        else:
            os.environ["CI"] = before
    return openvino


def _compressed(graph: Any, weights: str) -> Any:
    """The graph with matrices of 8 bits; or of 4, but for embedding, output projection and rows that neither 32
    nor 16 divides."""
    if not weights.startswith("int"):
        return graph
    with _tracing.quiet():
        import nncf

        if weights == "int8":
            return nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_ASYM)
        smaller = nncf.AdvancedCompressionParameters(group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST)
        mode = nncf.CompressWeightsMode.INT4_SYM
        return nncf.compress_weights(graph, mode=mode, group_size=_GROUP, advanced_parameters=smaller)


def open(folder: Path) -> Runtime:
    """The graph in OpenVINO, with as many threads as PyTorch takes, in float32."""
    return _tracing.runtime(cached(folder))


def cached(folder: Path, precision: str = "f32") -> _tracing.Cached:
    """The same, to be read from part by part, computed in `precision`. Two requests take turns, each of which reads
    the cache from where the other has written it."""
    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": precision}
    compiled = _openvino().compile_model(folder / FILE, "CPU", options)
    requests = itertools.cycle([compiled.create_infer_request(), compiled.create_infer_request()])
    inputs = {one.get_any_name(): one.get_partial_shape() for one in compiled.inputs}
    sizes = {name: [-1 if size.is_dynamic else size.get_length() for size in shape] for name, shape in inputs.items()}

    def run(given: Mapping[str, np.ndarray], past: Mapping[str, Any]) -> tuple[np.ndarray, Sequence[Any]]:
        found = next(requests).infer({**given, **past}, share_inputs=True, share_outputs=True)
        logits, *present = found.values()
        return np.array(logits), present

    return _tracing.Cached(sizes, run)


def versions() -> Mapping[str, str]:
    """Of the packages that wrote and opened it."""
    return {name: metadata.version(name) for name in ("torch", "transformers", *PACKAGES)}
