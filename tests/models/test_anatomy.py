"""MLPs found by shape; mixtures of experts refused, whichever part of them has the shape of an MLP."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MambaConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen3Config,
)

from sparsekd import compression, models
from sparsekd.errors import UsageError
from sparsekd.models import anatomy
from sparsekd.models.anatomy import MLP

ARCHITECTURES = ["llama", "qwen3", "phi3", "gpt2", "gpt_neox"]
GATED = ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"
FUSED = ("mlp.gate_up_proj",), "mlp.down_proj"
EXPECTED = {
    "llama": ("model.layers", *GATED),
    "qwen3": ("model.layers", *GATED),
    "phi3": ("model.layers", *FUSED),
    "gpt2": ("transformer.h", ("mlp.c_fc",), "mlp.c_proj"),
    "gpt_neox": ("gpt_neox.layers", ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
}
TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0}
SIZES: dict[str, Any] = TINY | TOKENS | {"intermediate_size": 64, "num_hidden_layers": 4, "num_key_value_heads": 2}
FEW = {"first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts": 4, "num_local_experts": 4}
FULL = {"layer_types": ["full_attention"] * 4}
MAMBA = {"mamba_n_heads": 8, "mamba_n_groups": 1, "mamba_d_head": 8, "shared_intermediate_size": 64}
FOURFOLD = {"intermediate_size": 128}  # of architectures whose MLPs are four times as wide as the hidden state
MIXTURES: dict[str, dict[str, Any]] = {
    # a dense first layer
    "afmoe": {},
    "deepseek_v2": {},
    "deepseek_v3": {},
    "dots1": {"n_shared_experts": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0},
    "ernie4_5_moe": {},
    "glm4_moe": {},
    "glm4_moe_lite": {},
    "jamba": {},
    "lfm2_moe": {"num_dense_layers": 1, **FULL},
    # shared experts
    "deepseek_v4": {},
    "granitemoehybrid": MAMBA,
    "granitemoeshared": {"shared_intermediate_size": 64},
    "hunyuan_v1_moe": {"head_dim": 8},
    "llama4_text": {},
    "longcat_flash": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 64},
    "qwen3_next": {"shared_expert_intermediate_size": 64},
    "qwen3_5_moe_text": {"shared_expert_intermediate_size": 64},
    # an MLP beside the experts
    "gemma4_text": {"enable_moe_block": True, "top_k_experts": 2, "moe_intermediate_size": 16},
    # nothing but experts
    "aria_text": {},
    "flex_olmo": {},
    "gpt_oss": {},
    "granitemoe": {},
    "jetmoe": {},
    "minimax": {},
    "mixtral": {},
    "olmoe": {},
    "phimoe": {},
    "qwen3_moe": {},
    # an MLP for some layers, mixtures for others
    "nemotron_h": {"num_hidden_layers": 52},
}
DENSE: dict[str, dict[str, Any]] = {
    "bamba": MAMBA,
    "bloom": FOURFOLD,
    "codegen": {"n_embd": 32, "n_layer": 4, "n_head": 4, "rotary_dim": 4, **FOURFOLD},
    "cohere2": {},
    "falcon": FOURFOLD,
    "falcon_h1": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "gemma3n_text": {"intermediate_size": [64, 64, 96, 96], "num_kv_shared_layers": 0, "laurel_rank": 8, **FULL},
    "gemma4_text": {},
    "glm4": {},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, **FOURFOLD},
    "gpt_neox": {},
    "granite": {},
    "granitemoehybrid": {**MAMBA, "num_local_experts": 0},
    "hunyuan_v1_dense": {"head_dim": 8},
    "jamba": {"num_experts": 1},
    "lfm2": {"block_auto_adjust_ff_dim": False},
    "llama": {},
    "mistral": {},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 4, **FOURFOLD},
    "nemotron": {"head_dim": 8},
    "olmo2": {},
    "olmo_hybrid": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_next": {"num_experts": 0},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
    "xglm": {"d_model": 32, "ffn_dim": 64, "num_layers": 4, "attention_heads": 4},
    "xlnet": {"d_model": 32, "d_inner": 64, "n_layer": 4, "n_head": 4},
}


def mlps_of(layers: str, inputs: tuple[str, ...], output: str, depth: int = 2) -> list[MLP]:
    return [MLP(tuple(f"{layers}.{i}.{name}" for name in inputs), f"{layers}.{i}.{output}") for i in range(depth)]


# ---- the MLP projections


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mlps_are_found_with_their_names(architecture: str, make_model: Callable[[str], PreTrainedModel]) -> None:
    assert anatomy.find_mlps(make_model(architecture)) == mlps_of(*EXPECTED[architecture])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mlps_of_a_compressed_model_are_the_same(
    architecture: str, make_model: Callable[[str], PreTrainedModel]
) -> None:
    model = compression.compress(make_model(architecture), reduction=0.3, method="svd")
    assert anatomy.find_mlps(model) == mlps_of(*EXPECTED[architecture])


def test_names_are_in_depth_order_beyond_ten_layers() -> None:
    config = Qwen3Config(**TINY, **TOKENS, intermediate_size=64, num_key_value_heads=2)
    config.num_hidden_layers = 12
    config.layer_types = ["full_attention"] * 12
    assert anatomy.find_mlps(AutoModelForCausalLM.from_config(config)) == mlps_of("model.layers", *GATED, depth=12)


@pytest.mark.parametrize("intermediate_size", [48, 64, 96])
@pytest.mark.parametrize("key_value_heads", [1, 2, 4])
def test_wide_qwen3_attention_is_no_mlp(key_value_heads: int, intermediate_size: int) -> None:
    """heads x head_dim is twice the hidden size, and in one case just the intermediate size."""
    config = Qwen3Config(
        **TINY, **TOKENS, intermediate_size=intermediate_size, num_key_value_heads=key_value_heads, head_dim=16
    )
    model = AutoModelForCausalLM.from_config(config)
    attention = model.get_submodule("model.layers.0.self_attn")
    assert anatomy.shape(attention.o_proj) == (64, 32)  # type: ignore[arg-type]
    assert anatomy.find_mlps(model) == mlps_of("model.layers", *GATED)


@pytest.mark.parametrize("head_dim", [8, 16])
@pytest.mark.parametrize("intermediate_size", [32, 48, 64])
def test_fused_phi3_attention_is_no_mlp(intermediate_size: int, head_dim: int) -> None:
    """With half as many key-value heads the fused qkv is twice as wide as the input of o_proj, like gate and up."""
    config = Phi3Config(**TINY, **TOKENS, intermediate_size=intermediate_size, num_key_value_heads=2)
    config.head_dim = head_dim
    model = AutoModelForCausalLM.from_config(config)
    attention = model.get_submodule("model.layers.0.self_attn")
    assert anatomy.shape(attention.qkv_proj)[1] == 2 * anatomy.shape(attention.o_proj)[0]  # type: ignore[arg-type]
    assert anatomy.find_mlps(model) == mlps_of("model.layers", *FUSED)


@pytest.mark.parametrize(
    "config",
    [
        MixtralConfig(**TINY, **TOKENS, intermediate_size=64, num_key_value_heads=2, num_local_experts=4),
        MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4, **TOKENS),
    ],
    ids=["mixtral", "mamba"],
)
def test_a_model_without_an_mlp_is_refused(config: Any) -> None:
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(
        UsageError, match=f"no MLP found in {type(model).__name__}: expected sibling linear layers 32->i"
    ):
        anatomy.find_mlps(model)
    before = models.weights_hash(model)
    with pytest.raises(UsageError, match="no MLP found"):
        compression.compress(model, reduction=0.3, method="svd")
    assert models.weights_hash(model) == before


# ---- dense decoders and mixtures of experts


def skeleton(model_type: str, **changes: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(model_type, **(SIZES | changes))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("model_type", MIXTURES)
def test_a_mixture_of_experts_is_refused(model_type: str) -> None:
    model = skeleton(model_type, **(FEW | MIXTURES[model_type]))
    with pytest.raises(UsageError, match="mixtures of experts are not supported") as raised:
        anatomy.find_mlps(model)
    assert type(model).__name__ in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("model_type", DENSE)
def test_a_dense_decoder_has_one_mlp_in_each_layer(model_type: str) -> None:
    model = skeleton(model_type, **DENSE[model_type])
    assert len(anatomy.find_mlps(model)) == len(anatomy.find_layers(model)) == 4


def test_the_refusal_says_what_was_found() -> None:
    with pytest.raises(UsageError) as raised:
        anatomy.find_mlps(skeleton("deepseek_v3", **FEW))
    assert str(raised.value) == (
        "DeepseekV3ForCausalLM: 1 of 4 decoder layers have one MLP, and model.layers.1.mlp.experts holds a stack of "
        "matrices; expected dense layers with one MLP each; mixtures of experts are not supported"
    )


class Routed(nn.Module):
    """The MLP of a dense layer with what a mixture would have beside it."""

    def __init__(self, mlp: nn.Module, **beside: nn.Module):
        super().__init__()
        self.shared = mlp
        for name, module in beside.items():
            self.add_module(name, module)


@pytest.mark.parametrize(
    ("beside", "reason"),
    [
        ({"experts": nn.ModuleList([nn.Linear(32, 8), nn.Linear(32, 8)])}, r"mlp\.experts is a list of modules"),
        ({"gate": nn.Linear(32, 4, bias=False)}, r"mlp\.gate\.weight is beside the matrices of an MLP"),
        ({"experts": nn.ParameterList([torch.zeros(4, 32, 8)])}, r"mlp\.experts holds a stack of matrices"),
    ],
    ids=["list", "router", "stack"],
)
def test_each_sign_of_experts_is_enough(
    beside: dict[str, nn.Module], reason: str, make_model: Callable[[str], PreTrainedModel]
) -> None:
    model = make_model("llama")
    layer: Any = model.get_submodule("model.layers.1")
    layer.mlp = Routed(layer.mlp, **beside)
    with pytest.raises(UsageError, match=f"2 of 2 decoder layers have one MLP, and model.layers.1.{reason}"):
        anatomy.find_mlps(model)


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gpt2", "gpt_neox"])
@pytest.mark.parametrize(
    "options", [{"format": "pivot"}, {"format": "lowrank"}, {"method": "wanda", "format": "mask"}], ids=str
)
def test_compressed_and_masked_models_are_dense(
    options: dict[str, Any], architecture: str, make_model: Callable[[str], PreTrainedModel]
) -> None:
    blocks = torch.randint(0, 300, (12, 32), generator=torch.Generator().manual_seed(0))
    model = compression.compress(make_model(architecture), blocks, reduction=0.4, **options)
    assert len(anatomy.find_mlps(model)) == 2
