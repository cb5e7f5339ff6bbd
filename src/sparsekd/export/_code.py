"""The file that an exported folder carries where plain transformers cannot make its layers: it imports torch and
transformers only, and has what this one model needs and nothing else, for it is read before it is trusted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import transformers
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import sparsekd
from sparsekd import files, models
from sparsekd.errors import UsageError

FILE = "modeling_sparsekd.py"
_CLASSES = {"two-factors": "TwoFactors", "row-pivot": "RowPivot", "column-pivot": "ColumnPivot"}
_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=False,  # noqa: S701 (Python, no HTML; all that goes in are names of classes and modules)
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


class Base(NamedTuple):
    """The names of the classes that the model is made from."""

    config: str
    model: str
    causal: str

    @property
    def names(self) -> list[str]:
        return sorted(self)


def is_needed(model: PreTrainedModel) -> bool:
    """Whether plain transformers cannot make the layers of `model`."""
    return model.config.model_type.startswith(models.forms.PREFIX)


def require(model: PreTrainedModel) -> None:
    """Raises `UsageError` for a base that transformers does not have, or that keeps MLPs outside of its base model, and
    for a sliced model."""
    if models.forms.form_of(model) is models.forms.form_named("sliced"):
        raise UsageError("format hf has no code for a sliced model: sparsekd.load opens it, onnx and openvino take it")
    found = _bases(model)
    foreign = [one.__name__ for one in found if getattr(transformers, one.__name__, None) is not one]
    if foreign:
        raise UsageError(f"{foreign[0]} is not a class of transformers itself: export such a model with --format dense")
    outside = [name for name in _layers(model) if not name.startswith(f"{model.base_model_prefix}.")]
    if outside:
        raise UsageError(f"{outside[0]} is not in the base model: export such a model with --format dense")


def add(model: PreTrainedModel, folder: Path) -> None:
    """Writes the file, and says in the config of `model` which of its classes open the folder."""
    base = Base(*(one.__name__ for one in _bases(model)))
    layers = _layers(model).values()
    kinds = sorted({layer["kind"] for layer in layers if "kind" in layer}, reverse=True)
    narrow = any("neurons" in layer for layer in layers)
    contents = ["narrower MLPs"] * narrow + ["low-rank matrices in its MLPs"] * bool(kinds)
    stock = getattr(_bases(model)[0], "base_model_tp_plan", None)
    text = _TEMPLATES.get_template(f"{FILE}.jinja").render(
        base=base,
        contents=" and ".join(contents),
        narrow=narrow,
        version=sparsekd.__version__,
        kinds=kinds,
        names=_CLASSES,
        model_type=model.config.model_type,
        plan=_tensor_parallel(model, stock) if kinds and stock else None,
        prefix=model.base_model_prefix,
        conv=any(isinstance(one, Conv1D) for one in model.modules()),
    )
    files.write_text(folder / FILE, text)
    config: Any = model.config
    opened = {"AutoConfig": base.config, "AutoModel": base.model, "AutoModelForCausalLM": base.causal}
    config.auto_map = {auto: f"{Path(FILE).stem}.SparseKD{name}" for auto, name in opened.items()}


def _tensor_parallel(model: PreTrainedModel, stock: Mapping[str, str]) -> dict[str, str]:
    """The base's plan, in which what was a matrix is two: the one that writes the hidden layer of an MLP is cut by
    columns in its second factor, the one that reads it by rows in its first. What is not listed is not cut, as the MLPs
    where not all is two factors: the parts of a pivot layer need the whole of each other."""
    prefix = f"{model.base_model_prefix}."
    low_rank = {name: layer for name, layer in _layers(model).items() if "kind" in layer}
    matrices = {name for mlp in models.find_mlps(model) for name in mlp.matrices}
    is_cut = matrices == low_rank.keys() and all(layer["kind"] == "two-factors" for layer in low_rank.values())
    patterns = {re.sub(r"\.\d+\.", ".*.", name.removeprefix(prefix)) for name in matrices}
    plan = {}
    for name, how in stock.items():
        if name not in patterns:
            plan[name] = how
        elif is_cut:
            plan[f"{name}.{'down' if how.startswith('rowwise') else 'up'}"] = how
    return plan


def _layers(model: PreTrainedModel) -> dict[str, Any]:
    return model.config.sparsekd["layers"]  # type: ignore[attr-defined]


def _bases(model: PreTrainedModel) -> list[Any]:
    """The classes of config, base model and model that ours are made from."""
    causal = models.forms.base_class(type(model))
    return [causal.config_class, type(model.base_model), causal]
