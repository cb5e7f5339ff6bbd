"""vLLM serves the folder of format `hf`, with no code of ours but the file in it: `make test-vllm`, for it needs an
environment of its own."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from narrowing import chosen, narrow
from tiny import sharpened
from transformers import LlamaConfig, LlamaForCausalLM

import sparsekd
from sparsekd import export
from sparsekd.export import hf

PYTHON = os.environ.get("SPARSEKD_VLLM", "")  # the interpreter of that environment
PROMPTS = [[5, 7, 11, 13], [17, 19, 23]]

pytestmark = pytest.mark.skipif(not PYTHON, reason="make test-vllm runs it")


def made(form: str) -> Any:
    """Heads of 64, which vLLM's attention has on CPUs; two of keys and values, for two processes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 400}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128}
    model = sharpened(LlamaForCausalLM(LlamaConfig(**sizes, **heads))).eval()
    if form == "widths":
        narrow(model, chosen(model, 64, 128))
    else:
        sparsekd.compress(model, reduction=0.3, method="svd", format=form)
    return model


@pytest.mark.parametrize("tensor_parallel", [1, 2])
@pytest.mark.parametrize("form", ["widths", "lowrank"])
def test_greedy_tokens_are_those_of_transformers(
    form: str, tensor_parallel: int, tokenizer: Any, tmp_path: Path
) -> None:
    model = made(form)
    hf.write(model, tokenizer, tmp_path, "float32", export.Source("made here"))
    command = [PYTHON, Path(__file__).with_name("serve.py"), tmp_path, str(tensor_parallel), json.dumps(PROMPTS)]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(tensor_parallel)))  # a core for each process
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("TOKENS ")]
    assert lines, done.stderr[-2000:]
    expected = []
    for prompt in PROMPTS:
        tokens = torch.tensor([prompt])
        for _ in range(8):
            with torch.no_grad():
                following = model(tokens, use_cache=False).logits[0, -1].argmax()
            tokens = torch.cat([tokens, following.view(1, 1)], dim=1)
        expected.append(tokens[0, len(prompt) :].tolist())
    assert json.loads(lines[0].removeprefix("TOKENS ")) == expected
