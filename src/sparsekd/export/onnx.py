"""Format `onnx`: one model.onnx for ONNX Runtime that reads prompts and goes on from a cache, and how to use it.

Inputs and outputs have the usual names: `input_ids`, `attention_mask`, `position_ids`, `past_key_values.0.key`, and, if
one likes, `num_logits_to_keep`; `logits`, `present.0.key`. Each weight is stored once, a tied embedding too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
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
        _default(graph.graph)
        onnx_ir.save(graph, folder / FILE, external_data=f"{FILE}.data")
    _tracing.write_surroundings(model, tokenizer, folder, "generate_onnx.py")
    return []


def _default(graph: Any) -> None:
    """All logits, for who does not say of how many positions: an input that is an initializer too need not be given."""
    import onnx_ir

    kept = next(one for one in graph.inputs if one.name == _tracing.KEPT)
    kept.const_value = onnx_ir.tensor(np.array(0), name=_tracing.KEPT)
    graph.register_initializer(kept)


def open(folder: Path) -> Runtime:
    """The graph in ONNX Runtime, with as many threads as PyTorch takes."""
    return _tracing.runtime(cached(folder))


def cached(folder: Path) -> _tracing.Cached:
    """The same, to be read from part by part. What it keeps of earlier tokens is not copied from call to call."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session: Any = onnxruntime.InferenceSession(folder / FILE, options)
    own: Any = onnxruntime.OrtValue.ortvalue_from_numpy
    optional = session.get_overridable_initializers()
    inputs = {one.name: one.shape for one in [*session.get_inputs(), *optional]}

    def run(given: Mapping[str, np.ndarray], past: Mapping[str, Any]) -> tuple[np.ndarray, Sequence[Any]]:
        values = {name: own(np.ascontiguousarray(array)) for name, array in given.items()}
        logits, *present = session.run_with_ort_values(None, {**values, **past})
        return logits.numpy(), present

    return _tracing.Cached(inputs, run)


def versions() -> Mapping[str, str]:
    """Of the packages that wrote and opened it."""
    return {name: metadata.version(name) for name in ("torch", "transformers", *PACKAGES)}
