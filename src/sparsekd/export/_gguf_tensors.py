"""The weights of a model as llama.cpp has them: its names, its order of the rows of attention, its number formats.

Shape letters: I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from sparsekd import models
from sparsekd.models import forms

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFReader

PER_LAYER = "deci"  # llama.cpp's architecture that is Llama, and has a width for each layer
_PERMUTED = {"llama", PER_LAYER}  # whose halves of a head lie interleaved in llama.cpp


@dataclass(frozen=True)
class Layout:
    """How the MLPs lie in the file."""

    architecture: str  # of llama.cpp
    widths: list[int]  # of the MLPs in the model, in depth order
    written: list[int]  # the same in the file: wider where the architecture has one width for all layers

    @property
    def is_padded(self) -> bool:
        return self.widths != self.written


def multiplied(model: PreTrainedModel) -> PreTrainedModel:
    """The model with ordinary matrices. Where some are of low rank, all MLPs are of one width, too; where none is, the
    model is what it was."""
    has_factors = any(hasattr(module, "factors") for module in model.modules())
    return forms.merged(model) if has_factors else model


def layout(model: PreTrainedModel, architecture: str) -> Layout:
    """What the file has to look like for a model of ordinary matrices, in one of llama.cpp's architectures."""
    widths = [models.shape(model.get_submodule(mlp.output))[0] for mlp in models.find_mlps(model)]
    if len(set(widths)) == 1:
        return Layout(architecture, widths, widths)
    if architecture == "llama":
        return Layout(PER_LAYER, widths, widths)
    return Layout(architecture, widths, [max(widths)] * len(widths))


@torch.no_grad()
def tensors(model: PreTrainedModel, chosen: Layout) -> Iterator[tuple[str, Float[np.ndarray, ...]]]:
    """Every weight of a model of ordinary matrices in float32, by its name in the file."""
    import gguf

    config: Any = model.config
    known = gguf.get_tensor_name_map(_known(chosen.architecture), len(chosen.widths))
    width_of = {
        matrix: widths
        for mlp, *widths in zip(models.find_mlps(model), chosen.widths, chosen.written, strict=True)
        for matrix in mlp.matrices
    }
    for name, weight in model.named_parameters():
        module, _, suffix = name.rpartition(".")
        weight = weight.detach().float().cpu()
        if module in width_of:
            weight = _padded(weight, *width_of[module], reads=module.endswith("down_proj"))
        if chosen.architecture in _PERMUTED and module.endswith(("q_proj", "k_proj")):
            is_query = module.endswith("q_proj")
            weight = _interleaved(weight, config.num_attention_heads if is_query else config.num_key_value_heads)
        yield f"{known.get_name(module)}.{suffix}", np.ascontiguousarray(weight.numpy())
    factors = rope_factors(model)
    if factors is not None:
        yield "rope_freqs.weight", factors.numpy()


def _known(architecture: str) -> Any:
    import gguf

    return next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)


def _padded(weight: Tensor, width: int, wanted: int, reads: bool) -> Tensor:
    """The matrix of an MLP with neurons that are zero behind its own; behind gate and behind up, where both are one."""
    if width == wanted:
        return weight
    if reads:
        return F.pad(weight, (0, wanted - width))
    return F.pad(weight.unflatten(0, (-1, width)), (0, 0, 0, wanted - width)).flatten(0, 1)


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key matrix for llama.cpp, which turns neighbours where transformers turns halves of a head."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _halves(weight: Tensor, heads: int) -> Tensor:
    """`_interleaved` undone."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def rope_factors(model: PreTrainedModel) -> Float[Tensor, " _"] | None:
    """What llama.cpp divides the frequencies of the rotary embedding by, which Llama 3 stretches; None: nothing."""
    inner: Any = model.base_model
    found = inner.rotary_emb.inv_freq.float().cpu()
    plain = model.config.rope_parameters["rope_theta"] ** -(torch.arange(len(found)) / len(found))
    factors = plain / found
    return None if torch.allclose(factors, torch.ones_like(factors), rtol=1e-4) else factors


def encoded(array: Float[np.ndarray, ...], weights: str) -> tuple[np.ndarray, GGMLQuantizationType]:
    """A weight in a number format: vectors stay float32, and rows that are no whole number of blocks float16."""
    import gguf

    kind = gguf.GGMLQuantizationType[weights.upper()]
    if array.ndim == 1:
        kind = gguf.GGMLQuantizationType.F32
    elif array.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = gguf.GGMLQuantizationType.F16
    return gguf.quantize(array, kind), kind


def field(reader: GGUFReader, key: str) -> Any:
    """A value of a file's metadata by its key, `ARCHITECTURE.` left out; None where there is none."""
    architecture: Any = reader.fields["general.architecture"].contents()
    found = reader.fields.get(key) or reader.fields.get(f"{architecture}.{key}")
    return None if found is None else found.contents()


def config_of(reader: GGUFReader) -> PreTrainedConfig:
    """What a file says of its model, for transformers, whose own reading leaves out the size of Qwen3's heads and reads
    the vocabulary once more, which takes seconds."""
    stored = {tensor.name for tensor in reader.tensors}
    architecture = field(reader, "general.architecture")
    heads, key_value_heads, width = (
        max(found) if isinstance(found, list) else found
        for found in map(
            partial(field, reader), ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
        )
    )
    head_size = field(reader, "attention.key_length")
    rope = {
        "rope_type": "default",
        "rope_theta": field(reader, "rope.freq_base"),
        "partial_rotary_factor": field(reader, "rope.dimension_count") / head_size,
    }
    return AutoConfig.for_model(
        "llama" if architecture == PER_LAYER else architecture,
        num_hidden_layers=field(reader, "block_count"),
        hidden_size=field(reader, "embedding_length"),
        intermediate_size=width,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=head_size,
        vocab_size=field(reader, "vocab_size"),
        rms_norm_eps=field(reader, "attention.layer_norm_rms_epsilon"),
        max_position_embeddings=field(reader, "context_length"),
        rope_parameters=rope,
        tie_word_embeddings="output.weight" not in stored,
        attention_bias="blk.0.attn_q.bias" in stored,
        mlp_bias="blk.0.ffn_up.bias" in stored,
        sliding_window=field(reader, "attention.sliding_window") or None,
        pad_token_id=None,
    )


def read_per_layer(reader: GGUFReader, config: Any) -> PreTrainedModel:
    """The model in a file of architecture `deci`, which transformers does not read."""
    import gguf

    stored = {tensor.name: tensor for tensor in reader.tensors}
    model = AutoModelForCausalLM.from_config(config)
    known = gguf.get_tensor_name_map(_known(PER_LAYER), config.num_hidden_layers)
    for name, _ in list(model.named_parameters()):
        module, _, suffix = name.rpartition(".")
        tensor = stored[f"{known.get_name(module)}.{suffix}"]
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        if module.endswith(("q_proj", "k_proj")):
            is_query = module.endswith("q_proj")
            weight = _halves(weight, config.num_attention_heads if is_query else config.num_key_value_heads)
        setattr(model.get_submodule(module), suffix, nn.Parameter(weight, requires_grad=False))
    model.tie_weights()
    return model
