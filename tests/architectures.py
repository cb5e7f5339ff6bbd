"""Tiny models of many architectures, from their configs."""

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0}
SIZES: dict[str, Any] = TINY | TOKENS | {"intermediate_size": 64, "num_hidden_layers": 4, "num_key_value_heads": 2}
FULL = {"layer_types": ["full_attention"] * 4}
MAMBA = {"mamba_n_heads": 8, "mamba_n_groups": 1, "mamba_d_head": 8, "shared_intermediate_size": 64}
PER_LAYER = {"vocab_size_per_layer_input": 400}
FOURFOLD = {"intermediate_size": 128}  # of architectures whose MLPs are four times as wide as the hidden state
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
    "gemma3n_text": {
        "intermediate_size": [64, 64, 96, 96],
        "num_kv_shared_layers": 0,
        "laurel_rank": 8,
        **FULL,
        **PER_LAYER,
    },
    "gemma4_text": PER_LAYER,
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


def made(model_type: str, **changes: Any) -> PreTrainedModel:
    """A model of four layers; of an architecture in `DENSE`, one without a mixture of experts."""
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **(SIZES | DENSE.get(model_type, {}) | changes))
    )
