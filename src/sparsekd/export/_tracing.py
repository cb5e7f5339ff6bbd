"""What the formats of transformers' exporters share: one graph that reads a prompt and goes on from a cache.

The graph takes tokens, the mask of all tokens so far, positions, and keys and values of the earlier tokens, of which
there may be none. Number of sequences, new tokens and earlier tokens are free.

Shape letters: B sequences, L positions, V vocabulary.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.export import Dim
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from sparsekd import files
from sparsekd.errors import ResourceError, UsageError

Step = Callable[[Mapping[str, np.ndarray]], np.ndarray]  # inputs of some new tokens to their logits
_TOKEN, _KEYS = {0: Dim.AUTO, 1: Dim.AUTO}, {0: Dim.AUTO, 2: Dim.AUTO}  # which dimensions are free


def require(format_: str, model: PreTrainedModel, packages: tuple[str, ...]) -> None:
    """Raises `ResourceError` for packages that are missing, `UsageError` for a model whose cache is another one."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if importlib.util.find_spec("transformers.exporters") is None:
        missing.append("transformers 5.23 or later")
    if missing:
        raise ResourceError(f'format {format_} needs {", ".join(missing)}: pip install "sparsekd[{format_}]"')
    if not all(isinstance(layer, DynamicLayer) for layer in DynamicCache(config=model.config).layers):
        raise UsageError(
            f"format {format_} takes models that keep keys and values of earlier tokens and nothing else, which "
            f"{model.config.model_type} does not: use --format hf"
        )


def exported(format_: str, exporter: Any, model: PreTrainedModel, options: Mapping[str, Any]) -> Any:
    """The graph, as `exporter` makes it; raises `UsageError` with its words where it cannot."""
    inputs, shapes = _example(model)
    try:
        with quiet():
            made = exporter().export(model, inputs, exporter.config_class(dynamic_shapes=shapes, **options))
    except Exception as error:  # torch, onnxscript and openvino raise almost any class for what they do not know
        reason = (" ".join(str(error).split()) or type(error).__name__)[:300]
        raise UsageError(f"format {format_} cannot take this {model.config.model_type} model: {reason}") from error
    return made.program


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


def in_parts(tokens: Int[Tensor, "B L"], step: Step) -> Float[Tensor, "B L V"]:
    """The logits of a text that is read as in use: a prompt, then one token, then some more, from the cache."""
    half, seen, found = tokens.shape[1] // 2, 0, []
    for part in tokens.tensor_split([half, half + 1], dim=1):
        count, length = part.shape
        if length:
            inputs = {
                "input_ids": part.numpy(),
                "attention_mask": np.ones((count, seen + length), np.int64),
                "position_ids": np.tile(np.arange(seen, seen + length), (count, 1)),
            }
            found.append(torch.from_numpy(step(inputs)))
            seen += length
    return torch.cat(found, dim=1)
