"""Format `openvino`: openvino_model.xml and .bin, a model that keeps its cache itself, and how to use it.

Inputs are `input_ids`, `attention_mask`, `position_ids` and `beam_idx`, the output is `logits`, as OpenVINO GenAI has
them. Each weight is stored once, a tied embedding too.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    "float32": Tolerance(0.01, 0.999, 1e-4),
    "float16": Tolerance(3.0, 0.99, 0.005),
    "int8": Tolerance(30.0, 0.9, 0.03),
    "int4": Tolerance(100.0, 0.5, 0.6),
}
PACKAGES = ("openvino", "nncf")
FILE = "openvino_model.xml"
_GROUP = 32  # weights in a row that share a scale, with 4 bits


def require(model: PreTrainedModel) -> None:
    _tracing.require("openvino", model, PACKAGES)


def write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, weights: str, source: Source
) -> list[str]:
    import openvino
    from transformers.exporters.exporter_openvino import OpenVINOExporter

    options = {"stateful": True, "compress_to_fp16": weights == "float16"}
    graph = _tracing.exported("openvino", OpenVINOExporter, model, options)
    if weights.startswith("int"):
        graph = _compressed(graph, weights)
    openvino.save_model(graph, folder / FILE, compress_to_fp16=False)
    _tracing.write_surroundings(model, tokenizer, folder, "generate_openvino.py")
    return []


def _compressed(graph: Any, weights: str) -> Any:
    """The graph with matrices of 8 bits; or of 4, but for embedding, output projection and rows that 32 does not
    divide."""
    with _tracing.quiet():
        import nncf

        if weights == "int8":
            return nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_ASYM)
        return nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT4_SYM, ratio=1, group_size=_GROUP)


def open(folder: Path) -> Runtime:
    import openvino

    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    request = openvino.compile_model(folder / FILE, "CPU", options).create_infer_request()
    taken = {name for one in request.model_inputs for name in one.get_names()}

    def run(tokens: torch.Tensor) -> torch.Tensor:
        request.reset_state()
        order: dict[str, Any] = {"beam_idx": np.arange(len(tokens), dtype=np.int32)}

        def step(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
            given = {name: array for name, array in ({**inputs, **order}).items() if name in taken}
            return request.infer(given)["logits"].copy()

        return _tracing.in_parts(tokens, step)

    return run


def versions() -> Mapping[str, str]:
    return {name: metadata.version(name) for name in ("torch", "transformers", *PACKAGES)}
