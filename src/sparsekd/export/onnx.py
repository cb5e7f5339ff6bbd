"""Format `onnx`: one model.onnx for ONNX Runtime that reads prompts and goes on from a cache, and how to use it.

Inputs and outputs have the usual names: `input_ids`, `attention_mask`, `position_ids`, `past_key_values.0.key`;
`logits`, `present.0.key`. Each weight is stored once, a tied embedding too.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    "float32": Tolerance(0.01, 0.999, 1e-4),
    "float16": Tolerance(3.0, 0.99, 0.005),
    "int8": Tolerance(30.0, 0.9, 0.03),
    "int4": Tolerance(100.0, 0.5, 0.6),
}
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
FILE = "model.onnx"


def require(model: PreTrainedModel) -> None:
    _tracing.require("onnx", model, PACKAGES)


def write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, weights: str, source: Source
) -> list[str]:
    import onnx_ir
    from transformers.exporters.exporter_onnx import OnnxExporter

    graph = _tracing.exported("onnx", OnnxExporter, model, {"optimize": False})
    with _tracing.quiet():
        _tidy(graph)
        _onnx_weights.change(graph.graph, weights)
        onnx_ir.save(graph, folder / FILE, external_data=f"{FILE}.data")
    _tracing.write_surroundings(model, tokenizer, folder, "generate_onnx.py")
    return []


def _tidy(model: Any) -> None:
    """Usual names, constants folded, nothing that is not used. onnxscript's rewriting, a third of the time of an
    export, is left to ONNX Runtime, which does its own."""
    from onnx_ir.passes import common
    from onnxscript import optimizer

    common.InlinePass()(model)
    optimizer.fold_constants(model)
    for step in (
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.ClearMetadataAndDocStringPass(),
    ):
        step(model)
    for value in [*model.graph.inputs, *model.graph.outputs]:
        words = value.name.split(".")  # input.past_key_values.layers.0.keys
        if "past_key_values" in words:
            start = "past_key_values" if value in model.graph.inputs else "present"
            value.name = f"{start}.{words[-2]}.{words[-1].removesuffix('s')}"


def open(folder: Path) -> Runtime:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / FILE, options)
    taken = {one.name: one for one in session.get_inputs()}
    cache = [name for name in taken if name.startswith("past_key_values")]

    def run(tokens: torch.Tensor) -> torch.Tensor:
        sizes = ((len(tokens), taken[name].shape[1], 0, taken[name].shape[3]) for name in cache)
        past = [np.zeros(size, np.float32) for size in sizes]

        def step(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
            nonlocal past
            given = {name: array for name, array in inputs.items() if name in taken}
            logits, *past = session.run(None, given | dict(zip(cache, past, strict=True)))
            return logits

        return _tracing.in_parts(tokens, step)

    return run


def versions() -> Mapping[str, str]:
    return {name: metadata.version(name) for name in ("torch", "transformers", *PACKAGES)}
