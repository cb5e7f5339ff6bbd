"""Tiny models for the exports, and what their example says beside PyTorch's `generate`."""

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from narrowing import chosen, narrow
from tiny import sharpened
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import sparsekd
from sparsekd.bench.cells import Variant
from sparsekd.bench.runtimes import RUNTIMES, open_session
from sparsekd.evaluate import Serving, Session, prompt

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


def serves_as_pytorch_does(model: PreTrainedModel, folder: Path, runtime: str) -> None:
    """In the bench: two prompts, twice, and tokens after each of them."""
    assert RUNTIMES[runtime].takes(str(folder)) and not RUNTIMES["torch"].takes(str(folder))
    variant = Variant(runtime, "float32", "own")
    found = [_greedy(one) for one in (Serving(model), open_session(str(folder), variant, torch.device("cpu")))]
    assert torch.equal(*found)


def _greedy(session: Session) -> torch.Tensor:
    tokens = []
    for start in (0, 7):
        following = session.prefill(prompt(2, 9) + start)
        for _ in range(6):
            tokens.append(following)
            following = session.decode(following)
    return torch.stack(tokens)
