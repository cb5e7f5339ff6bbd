"""MLPs found by shape; mixtures of experts refused, whichever part of them has the shape of an MLP."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import DENSE, FULL, MAMBA, TINY, TOKENS, made
from torch import nn
from transformers import (
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
FEW = {"first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts": 4, "num_local_experts": 4}
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
    with torch.device("meta"):
        return made(model_type, **changes)


@pytest.mark.parametrize("model_type", MIXTURES)
def test_a_mixture_of_experts_is_refused(model_type: str) -> None:
    model = skeleton(model_type, **(FEW | MIXTURES[model_type]))
    with pytest.raises(UsageError, match="mixtures of experts are not supported") as raised:
        anatomy.find_mlps(model)
    assert type(model).__name__ in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("model_type", DENSE)
def test_a_dense_decoder_has_one_mlp_in_each_layer(model_type: str) -> None:
    model = skeleton(model_type)
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
