"""Format `gguf`: one file for llama.cpp and what is built on it.

Widths are as they are in the model. Of llama.cpp's architectures one has a width for each layer, `deci`, which is Llama
otherwise: Llama models get it where they need it; others are filled up with neurons that are zero. Low-rank matrices
are multiplied, for llama.cpp has no pairs.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from jaxtyping import Int
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from sparsekd import files
from sparsekd.errors import QualityError, ResourceError, UsageError
from sparsekd.export import _gguf_tensors as _tensors
from sparsekd.export import _gguf_tokenizer as _tokenizer
from sparsekd.export import llama_cpp
from sparsekd.export.checking import Runtime, Tolerance
from sparsekd.export.source import Source
from sparsekd.models import forms, gguf_reader, locate, num_parameters
from sparsekd.records import Record

if TYPE_CHECKING:
    from gguf import GGUFWriter

WEIGHTS: dict[str, Tolerance] = {
    "f16": Tolerance(0.5, 0.98, 0.005),
    "bf16": Tolerance(2.0, 0.96, 0.02),
    "f32": Tolerance(1e-3, 0.999, 1e-4),
    "q8_0": Tolerance(4.0, 0.95, 0.02),
    "q6_k": Tolerance(8.0, 0.9, 0.05),
    "q4_k_m": Tolerance(20.0, 0.75, 0.25),
}
_IN_LLAMA_CPP = WEIGHTS | {
    "f32": Tolerance(0.5, 0.98, 0.005),  # its cache of keys and values is float16
    "q8_0": Tolerance(6.0, 0.9, 0.05),  # it rounds what the matrices are multiplied with, too
}
PACKAGES = ("gguf",)
FILE = "model.gguf"
_ARCHITECTURES = {"llama": "llama", "phi3": "phi3", "qwen2": "qwen2", "qwen3": "qwen3"}  # by transformers' model_type
_MADE_BY_TOOL = ("q6_k", "q4_k_m")
_TOOL = "llama-quantize"


def require(model: PreTrainedModel) -> None:
    """Raises `UsageError` for an architecture, or a variant of one, that llama.cpp does not compute so."""
    forms.require_mergeable(model)
    config: Any = model.config
    name = _model_type(model)
    if name not in _ARCHITECTURES:
        raise UsageError(f"format gguf cannot take a model of type {name}: it has {', '.join(_ARCHITECTURES)}")
    rope = config.rope_parameters["rope_type"]
    if rope not in (("default", "llama3") if name == "llama" else ("default",)):
        raise UsageError(f"format gguf cannot take a {name} model whose rotary embedding is of type {rope}")
    if config.hidden_act not in ("silu", "swish"):
        raise UsageError(f"format gguf cannot take a {name} model with {config.hidden_act}: llama.cpp has silu there")


def _model_type(model: PreTrainedModel) -> str:
    return model.config.model_type.removeprefix(forms.PREFIX)


def write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, weights: str, source: Source
) -> list[str]:
    """One file, with the tokenizer in it; returns what is not as one would expect."""
    make = _quantize if weights in _MADE_BY_TOOL else _write
    ordinary = _tensors.multiplied(model)
    make(ordinary, tokenizer, folder, weights, source)
    return list(_notes(model, ordinary, folder, weights))


def _write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, weights: str, source: Source
) -> None:
    from gguf import GGUFWriter

    chosen = _tensors.layout(model, _ARCHITECTURES[_model_type(model)])
    writer = GGUFWriter(folder / FILE, chosen.architecture)
    _describe(writer, model.config, chosen, weights)
    base = _base_file(source)
    if base is not None:
        _tokenizer.copy_metadata(writer, base)
    else:
        writer.add_name(Path(source.base).name)
        embeddings: Any = model.get_input_embeddings()
        _tokenizer.describe(writer, tokenizer, embeddings.num_embeddings)
    for name, array in _tensors.tensors(model, chosen):
        stored, kind = _tensors.encoded(array, weights)
        writer.add_tensor(name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _base_file(source: Source) -> Path | None:
    """The GGUF file that the run started from; None where it started from something else."""
    place = locate(source.base)
    return Path(place.source) / place.options["gguf_file"] if place.gguf else None


def _describe(writer: GGUFWriter, config: Any, chosen: _tensors.Layout, weights: str) -> None:
    """The sizes of a model."""
    import gguf

    is_per_layer = chosen.architecture == _tensors.PER_LAYER
    layers = len(chosen.written)
    heads, key_value_heads = config.num_attention_heads, config.num_key_value_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = config.rope_parameters
    writer.add_block_count(layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(chosen.written if is_per_layer else chosen.written[0])
    writer.add_head_count([heads] * layers if is_per_layer else heads)
    writer.add_head_count_kv([key_value_heads] * layers if is_per_layer else key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_size * rope.get("partial_rotary_factor", 1)))
    writer.add_vocab_size(config.vocab_size)
    if chosen.architecture == "phi3":
        writer.add_sliding_window(config.sliding_window or 0)
    writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if weights == 'f32' else 'MOSTLY'}_{weights.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _quantize(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, weights: str, source: Source
) -> None:
    """Has llama.cpp's own tool write the file."""
    tool = shutil.which(_TOOL)
    if tool is None:
        raise ResourceError(
            f"--weights {weights} is made by llama.cpp's {_TOOL}, which is not on PATH: q8_0 needs nothing"
        )
    _write(model, tokenizer, folder, "f32", source)
    folder = folder.resolve()  # the tool takes a path that begins with a digit for a number format
    whole = (folder / FILE).rename(folder / "f32.gguf")
    done = subprocess.run([tool, whole, folder / FILE, weights], capture_output=True, text=True)  # noqa: S603
    files.remove(whole)
    if done.returncode:
        raise QualityError(f"{_TOOL} failed: {(done.stderr or done.stdout).strip().splitlines()[-1]}")


def open(folder: Path) -> Runtime:
    """The file as transformers reads it; what it does not read is put in: the stretched frequencies of Llama 3, and all
    of a model with a width for each layer."""
    reader = gguf_reader(folder / FILE)
    config = _tensors.config_of(reader)
    model: Any
    if _tensors.field(reader, "general.architecture") == _tensors.PER_LAYER:
        model = _tensors.read_per_layer(reader, config)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, config=config, dtype=torch.float32)
    stretched = [tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight"]
    if stretched:
        model.model.rotary_emb.inv_freq /= torch.from_numpy(stretched[0].copy())
    model.eval()
    return lambda tokens: model(input_ids=tokens).logits


def versions() -> Mapping[str, str]:
    """Of the packages that wrote and read it."""
    return {"gguf": importlib.metadata.version("gguf"), "transformers": transformers.__version__}


def check_further(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    weights: str,
    source: Source,
    tokens: Int[Tensor, "B L"],
) -> Record:
    """Asks llama.cpp, where it is installed. Raises `QualityError` where it does not say what PyTorch does."""
    why, notes = llama_cpp.missing(), []
    if why is not None:
        return {"notes": [why]}
    version, found = llama_cpp.compare(model, tokenizer, folder / FILE, tokens)
    problem = _IN_LLAMA_CPP[weights].problem(found)
    if problem:
        raise QualityError(f"llama.cpp does not say what the model does ({weights}): {problem}")
    if not found.text_is_split_alike and _base_file(source) is None:
        raise QualityError("llama.cpp splits text otherwise than the model's tokenizer, which format gguf cannot carry")
    if not found.text_is_split_alike:
        notes.append("llama.cpp splits text otherwise than transformers does with the tokenizer of the same GGUF file")
    return {"notes": notes, "llama.cpp": llama_cpp.as_record(version, found)}


def _notes(model: PreTrainedModel, ordinary: PreTrainedModel, folder: Path, weights: str) -> Iterator[str]:
    """What is not as one would expect."""
    chosen = _tensors.layout(ordinary, _ARCHITECTURES[_model_type(ordinary)])
    if chosen.is_padded:
        yield f"llama.cpp's {chosen.architecture} has one width: layers are filled up with zeros to {chosen.written[0]}"
    before, written = num_parameters(model), num_parameters(ordinary)
    if forms.form_of(model) is not None and written >= forms.dense_sizes(model).model:
        yield "llama.cpp has dense matrices only: the file is neither smaller nor faster than that of the dense model"
    elif written > before:
        yield f"low rank is multiplied out: {written / before - 1:.0%} more parameters than in the exported model"
    if weights == "q8_0":
        kinds = [tensor.tensor_type.name for tensor in gguf_reader(folder / FILE).tensors]
        if kinds.count("F16"):
            yield f"{kinds.count('F16')} matrices are float16, for their rows are no multiple of 32"
