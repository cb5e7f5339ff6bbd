"""What the formats `onnx` and `openvino` share: one graph that reads a prompt and goes on from a cache.

The graph takes tokens, the mask of all tokens so far, positions, how many positions are to have logits, and keys and
values of the earlier tokens, of which there may be none. Number of sequences, new tokens and earlier tokens are free.

Shape letters: B sequences, L positions, K of them with logits, V vocabulary.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.export import Dim
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from sparsekd import files
from sparsekd.errors import UsageError
from sparsekd.export.checking import Runtime

KEPT = "num_logits_to_keep"  # as transformers.js names it: logits of so many last positions; 0: of all
# inputs by name, and of these the cache as the last call gave it, to logits and the cache as the next call takes it
Run = Callable[[Mapping[str, np.ndarray], Mapping[str, Any]], tuple[np.ndarray, Sequence[Any]]]
_PASSED = ("Add", "Mul", "Div", "Tanh", "Cast")  # what may stand between the output projection and the logits
_TOKEN, _KEYS = {0: Dim.AUTO, 1: Dim.AUTO}, {0: Dim.AUTO, 2: Dim.AUTO}  # which dimensions are free


def require(format_: str, model: PreTrainedModel) -> None:
    """Raises `UsageError` for a model whose cache is another one."""
    if not all(isinstance(layer, DynamicLayer) for layer in DynamicCache(config=model.config).layers):
        raise UsageError(
            f"format {format_} takes models that keep keys and values of earlier tokens and nothing else, which "
            f"{model.config.model_type} does not: use --format hf"
        )


def graph_of(format_: str, model: PreTrainedModel) -> Any:
    """The model as an `onnx_ir` graph; raises `UsageError` with the exporter's words where there is none."""
    export = _by_torch if importlib.util.find_spec("transformers.exporters") is None else _by_transformers
    try:
        with quiet():
            made = export(model, *_example(model))
            _tidy(made)
    except Exception as error:  # torch and onnxscript raise almost any class for what they do not know
        reason = (" ".join(str(error).split()) or type(error).__name__)[:300]
        raise UsageError(f"format {format_} cannot take this {model.config.model_type} model: {reason}") from error
    return made


def _by_transformers(model: PreTrainedModel, inputs: dict[str, Any], shapes: dict[str, Any]) -> Any:
    """By transformers' exporters, which are experimental and were tried from 5.23 on."""
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    return OnnxExporter().export(model, inputs, OnnxConfig(dynamic_shapes=shapes, optimize=False)).program


def _by_torch(model: PreTrainedModel, inputs: dict[str, Any], shapes: dict[str, Any]) -> Any:
    """By torch alone, to which the cache is a list of tensors."""
    given = inputs | {"past_key_values": _listed(inputs["past_key_values"])}
    program = torch.onnx.export(
        _WithList(model).eval(), kwargs=given, dynamic_shapes=shapes, dynamo=True, optimize=False, verbose=False
    )
    assert program is not None
    return program.model


class _WithList(nn.Module):
    """A model whose cache goes in and out as a list: keys and values of the first layer, those of the second, .."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self._model = model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        past_key_values: list[Tensor],
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        cache = DynamicCache(config=self._model.config)
        for layer, (keys, values) in enumerate(zip(past_key_values[::2], past_key_values[1::2], strict=True)):
            cache.update(keys, values, layer)
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if position_ids is not None:
            inputs["position_ids"] = position_ids
        logits = self._model(**inputs, past_key_values=cache).logits
        return logits, _listed(cache)


def _listed(cache: DynamicCache) -> list[Any]:
    layers: Any = cache.layers
    return [value for layer in layers for value in (layer.keys, layer.values)]


def _tidy(model: Any) -> None:
    """Usual names, constants folded, nothing that is not used. onnxscript's rewriting, a third of the time of an
    export, is left to the runtimes, which do their own."""
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
    caches = [value for value in model.graph.inputs if "past_key_values" in value.name]
    logits, *present = model.graph.outputs
    logits.name = "logits"
    for start, values in (("past_key_values", caches), ("present", present)):
        for number, value in enumerate(values):
            value.name = f"{start}.{number // 2}.{('key', 'value')[number % 2]}"
    _keep_last(model.graph)


def _keep_last(graph: Any) -> None:
    """Adds the input `KEPT`, so that a prompt costs one product with the vocabulary and not one for each token."""
    import onnx_ir

    logits = [graph.outputs[0]]
    while (made_by := logits[-1].producer()).op_type in _PASSED:
        logits.append(next(one for one in made_by.inputs if one.const_value is None))
    if made_by.op_type not in ("MatMul", "Gemm"):
        raise ValueError(f"logits come from {made_by.op_type}, not from a product with a matrix")
    blocks, _, vocab = logits[0].shape  # that of a product before a bias is not known
    for value in logits:
        value.shape = onnx_ir.Shape([blocks, "kept", vocab])
    kept = onnx_ir.Value(name=KEPT, type=onnx_ir.TensorType(onnx_ir.DataType.INT64), shape=onnx_ir.Shape([]))
    graph.inputs.append(kept)
    one, axes, end = (
        constant(graph, f"{KEPT}.{name}", np.array([number]))
        for name, number in (("rank", 1), ("axis", 1), ("end", np.iinfo(np.int64).max))
    )
    negative = onnx_ir.node("Neg", [kept])
    start = onnx_ir.node("Reshape", [negative.outputs[0], one])
    last = onnx_ir.node("Slice", [made_by.inputs[0], start.outputs[0], end, axes])  # -0 is the start: all
    graph.insert_before(made_by, [negative, start, last])
    made_by.replace_input_with(0, last.outputs[0])


def constant(graph: Any, name: str, array: np.ndarray) -> Any:
    """A new constant of the graph."""
    import onnx_ir

    made = onnx_ir.tensor(array, name=name)
    value = onnx_ir.Value(name=name, const_value=made)
    value.dtype, value.shape = made.dtype, onnx_ir.Shape(array.shape)
    graph.register_initializer(value)
    return value


def _example(model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two sequences with four earlier tokens and three new ones, and which dimensions of them are free."""
    tokens = torch.arange(14).view(2, 7)  # no dimension is one: a graph takes that for a constant
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=tokens[:, :4], past_key_values=cache)
    inputs: dict[str, Any] = {"input_ids": tokens[:, 4:].clone(), "attention_mask": torch.ones_like(tokens)}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = torch.arange(4, 7).repeat(2, 1)
    shapes: dict[str, Any] = dict.fromkeys(inputs, _TOKEN)
    return inputs | {"past_key_values": cache}, shapes | {"past_key_values": [_KEYS] * (2 * len(cache.layers))}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps to themselves what the exporters print, log and warn of: the comparison tells whether they worked.

    onnxruntime's quantiser also sets up the logging of the whole process, which is put back.
    """
    root = logging.root
    disabled, level, handlers = root.manager.disable, root.level, root.handlers[:]
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*treespec")
            yield
    finally:
        logging.disable(disabled)
        root.setLevel(level)
        root.handlers[:] = handlers


def write_surroundings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, example: str) -> None:
    """What stands beside the graph: tokenizer, settings, and `generate.py`, which uses it without this package."""
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    text = Path(__file__).with_name("examples").joinpath(example).read_text(encoding="utf-8")
    files.write_text(folder / "generate.py", text)


class Cached:
    """A graph and the cache that it gave last."""

    def __init__(self, inputs: Mapping[str, Sequence[Any]], run: Run):
        """`inputs` are the names and shapes that the graph takes."""
        self._run, self._inputs = run, inputs
        self._caches = {name: shape for name, shape in inputs.items() if name.startswith("past_key_values")}
        self._past: dict[str, Any] = {}
        self._seen = 0

    def forget(self) -> None:
        """The next tokens are the first ones."""
        self._past, self._seen = {}, 0

    def read(self, tokens: Int[Tensor, "B L"], kept: int = 0) -> Float[Tensor, "B K V"]:
        """Logits of the last `kept` positions, 0: of all, of tokens that follow those before."""
        count, end = len(tokens), self._seen + tokens.shape[1]
        given = {
            "input_ids": tokens.numpy(),
            "attention_mask": np.ones((count, end), np.int64),
            "position_ids": np.tile(np.arange(self._seen, end), (count, 1)),
            KEPT: np.array(kept),
        }
        if not self._seen:
            given |= {
                name: np.zeros((count, heads, 0, width), np.float32)
                for name, (_, heads, _, width) in self._caches.items()
            }
        given = {name: array for name, array in given.items() if name in self._inputs}
        logits, present = self._run(given, self._past)
        self._past, self._seen = dict(zip(self._caches, present, strict=True)), end
        return torch.from_numpy(logits)


def runtime(graph: Cached) -> Runtime:
    """Reads a text as in use: a prompt, then one token, then some more, each from the cache that the last gave."""

    def logits(tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B L V"]:
        half = tokens.shape[1] // 2
        graph.forget()
        parts = [part for part in tokens.tensor_split([half, half + 1], dim=1) if part.shape[1]]
        return torch.cat([graph.read(part) for part in parts], dim=1)

    return logits
