"""Open models, dense and compressed.

A compressed model is an ordinary transformers model. Where its form needs layers of its own, it is of a class made on
the fly: `SparseKDLlamaForCausalLM` is `LlamaForCausalLM` with `forms._layers.Rebuilt` mixed in, which puts the layers
where `config.sparsekd` says. Its `model_type`, `sparsekd_llama`, is unknown to plain transformers, which therefore
refuses the folder instead of filling the MLPs with random numbers. Other forms keep the class and the type of the
dense model.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from sparsekd.errors import DataError
from sparsekd.models import admission, forms
from sparsekd.models.anatomy import num_parameters
from sparsekd.models.gguf_files import parsed_once
from sparsekd.models.locating import Location, explaining, locate, raw_config, weight_files
from sparsekd.models.saving import require_whole
from sparsekd.models.vocabulary import check_tokenizer
from sparsekd.recipe import EMBEDDED_MODEL


def load(
    name: str = EMBEDDED_MODEL,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Opens a model, dense or compressed, and its tokenizer.

    `name` is a folder, a Hub id, a .gguf file or `smollm2-135m`; `dtype` None keeps the checkpoint's own (float32
    for GGUF). Raises `UsageError` if there is no such model, `DataError` if it is there but cannot be used: pickled
    weights, a damaged file, weights missing, a tokenizer with more tokens than the model has embeddings.
    """
    place = locate(name)
    if not place.gguf:
        require_whole(Path(place.source))
    options = _options(place, revision, trust_remote_code)
    with explaining(name), parsed_once(place):
        config, model_class = _config_and_class(name, place, options)
        weights = weight_files(name, place, revision)
        if not place.gguf and not hasattr(config, "quantization_config"):  # which packs several weights in a number
            described = num_parameters(_modules(config, model_class, trust_remote_code))
            admission.check_size(name, described, weights)
        model, info = model_class.from_pretrained(
            place.source,
            config=config,
            dtype=dtype or (torch.float32 if place.gguf else "auto"),
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are named below
            output_loading_info=True,
            **options,
        )
        tokenizer = AutoTokenizer.from_pretrained(place.source, config=config, **options)
    if info["missing_keys"] or info["mismatched_keys"]:
        wrong = sorted(info["missing_keys"]) or sorted(str(key) for key in info["mismatched_keys"])
        raise DataError(f"model {name}: {len(wrong)} weights are missing or of the wrong shape, first: {wrong[0]}")
    if place.gguf:
        _make_ordinary(model)
    elif hasattr(model.config, "quantization_config") and not hasattr(model, "hf_quantizer"):
        raise DataError(
            f"model {name}: quantization_config in config.json is of a method that transformers does not know"
        )
    _check_finite(model, name)
    forms.check(model)
    check_tokenizer(model, tokenizer, name)
    return model.to(device).eval(), tokenizer


def skeleton(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model's modules on the meta device: all shapes, no weights read. For plans and estimates."""
    place = locate(name)
    options = _options(place, revision, trust_remote_code)
    with explaining(name), parsed_once(place):
        return _modules(*_config_and_class(name, place, options), trust_remote_code)


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """A model's tokenizer without its weights. Raises as `load`."""
    place = locate(name)
    options = _options(place, revision, trust_remote_code)
    with explaining(name), parsed_once(place):
        config, _ = _config_and_class(name, place, options)
        return AutoTokenizer.from_pretrained(place.source, config=config, **options)


def _options(place: Location, revision: str | None, trust_remote_code: bool) -> dict[str, Any]:
    """What `from_pretrained` is given."""
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, **place.options}
    return options if revision is None else options | {"revision": revision}


def _modules(config: PreTrainedConfig, model_class: Any, trust_remote_code: bool) -> PreTrainedModel:
    """A model without weights."""
    with torch.device("meta"):
        if model_class is AutoModelForCausalLM:
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        return model_class(config)


def _config_and_class(name: str, place: Location, options: dict[str, Any]) -> tuple[PreTrainedConfig, Any]:
    if place.gguf:
        config = AutoConfig.from_pretrained(place.source, **options)
        admission.check_config(name, config.to_dict())
        return config, AutoModelForCausalLM
    raw = raw_config(place, options.get("revision"))
    admission.check_config(name, raw)
    model_type = raw.get("model_type", "")
    is_ours = isinstance(model_type, str) and model_type.startswith(forms.PREFIX)
    if is_ours:
        raw.pop("auto_map", None)  # of an export: the classes here open it, not the code in the folder
    base = CONFIG_MAPPING[model_type.removeprefix(forms.PREFIX)] if is_ours else None
    config = base.from_dict(raw) if base is not None else AutoConfig.from_pretrained(place.source, **options)
    if not is_ours and "sparsekd" not in raw:
        return config, AutoModelForCausalLM
    description = raw.get("sparsekd")
    if isinstance(description, dict) and "version" not in description:
        description = forms.from_earlier(description, _dense_modules(config, options["trust_remote_code"]))
    forms.require_described(description, place.source)
    if base is None:
        config.sparsekd = description
        return config, AutoModelForCausalLM
    model_class = forms.rebuilt_class(MODEL_FOR_CAUSAL_LM_MAPPING[base])
    return model_class.config_class.from_dict(raw | {"sparsekd": description}), model_class


def _dense_modules(config: PreTrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    """The model that a config describes, without weights, as it was before anything was removed."""
    dense: Any = copy.deepcopy(config)
    del dense.sparsekd
    return _modules(dense, AutoModelForCausalLM, trust_remote_code)


def _make_ordinary(model: PreTrainedModel) -> None:
    """A model read from GGUF is float32 already but carries the mark of a quantised one and refuses to be saved."""
    unmarked: Any = model
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    unmarked.is_quantized = False
    del unmarked.config.quantization_config
    unmarked.config.dtype = model.dtype


def _check_finite(model: PreTrainedModel, name: str) -> None:
    """Raises `DataError` naming the first matrix with a number that is none; most texts pass by an embedding's row."""
    for key, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.element_size() > 1 and not _is_finite(parameter):
            raise DataError(f"model {name}: {key} holds numbers that are not finite")


def _is_finite(parameter: Tensor) -> bool:
    if not parameter.numel():
        return True
    smallest, largest = parameter.aminmax()  # one pass, a ninth of the time of `isfinite`; NaN is both
    return bool(smallest.isfinite() & largest.isfinite())
