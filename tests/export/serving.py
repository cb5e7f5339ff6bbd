"""Tiny models for the exports, and what their example says beside PyTorch's `generate`."""

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from narrowing import chosen, narrow
from tiny import sharpened
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import sparsekd

PROMPT, COUNT = "Silver river quiet", 12
MODELS = ("llama, a width a layer", "qwen3, low rank", "phi3")


def model_named(name: str, make_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """A tiny model, compressed or not."""
    model = sharpened(make_model(name.partition(",")[0]))
    if "width" in name:
        narrow(model, chosen(model, 40, 17))
    if "low rank" in name:
        model = sparsekd.compress(copy.deepcopy(model), reduction=0.3, method="svd")
    return model


def continued(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> str:
    """The prompt and what PyTorch generates."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    found = model.generate(**inputs, max_new_tokens=COUNT, do_sample=False)
    return tokenizer.decode(found[0], skip_special_tokens=True)


def example_says(folder: Path) -> str:
    """What the folder's `generate.py` prints, in a Python that does not see this package."""
    command = [sys.executable, "-I", str(folder / "generate.py"), PROMPT, str(COUNT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.removesuffix("\n")
