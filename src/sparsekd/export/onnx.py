"""Format `onnx`: one model.onnx for ONNX Runtime that reads prompts and goes on from a cache, and how to use it.

Inputs and outputs have the usual names: `input_ids`, `attention_mask`, `position_ids`, `past_key_values.0.key`;
`logits`, `present.0.key`. Each weight is stored once, a tied embedding too.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsekd.export import _onnx_weights, _tracing
from sparsekd.export.checking import Runtime, Tolerance
from sparsekd.export.source import Source

WEIGHTS: Mapping[str, Tolerance] = {
    "float32": Tolerance(0.01, 0.995, 1e-4),
    "float16": Tolerance(3.0, 0.99, 0.005),
    "int8": Tolerance(30.0, 0.9, 0.03),
    "int4": Tolerance(100.0, 0.5, 0.6),
}
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
FILE = "model.onnx"


def require(model: PreTrainedModel) -> None:
    """Raises `UsageError` for a model whose cache is not keys and values."""
    _tracing.require("onnx", model)


def write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, weights: str, source: Source
) -> list[str]:
    """The graph and what stands beside it."""
    import onnx_ir

    graph = _tracing.graph_of("onnx", model)
    with _tracing.quiet():
        _onnx_weights.change(graph.graph, weights)
        onnx_ir.save(graph, folder / FILE, external_data=f"{FILE}.data")
    _tracing.write_surroundings(model, tokenizer, folder, "generate_onnx.py")
    return []


def open(folder: Path) -> Runtime:
    """The graph in ONNX Runtime, with as many threads as PyTorch takes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session: Any = onnxruntime.InferenceSession(folder / FILE, options)
    inputs = {one.name: one.shape for one in session.get_inputs()}
    return _tracing.runtime(inputs, lambda given: session.run(None, given))


def versions() -> Mapping[str, str]:
    """Of the packages that wrote and opened it."""
    return {name: metadata.version(name) for name in ("torch", "transformers", *PACKAGES)}
