"""Format `hf`: a folder that `AutoModelForCausalLM.from_pretrained` opens.

Where transformers can make the layers by itself it needs no code of ours; else the folder has one short file, which
runs where `trust_remote_code=True` is given. `sparsekd.load` opens both, and never runs that file.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsekd import models
from sparsekd.errors import QualityError
from sparsekd.export import _code, _plain
from sparsekd.export.checking import Runtime, Tolerance
from sparsekd.export.source import Source

WEIGHTS: Mapping[str, Tolerance] = {
    "float32": Tolerance(1e-3, 0.999, 1e-4),
    "bfloat16": Tolerance(2.0, 0.95, 0.01),
    "float16": Tolerance(0.2, 0.99, 0.002),
}
_USAGE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file is, or the name on the Hub
tokenizer = AutoTokenizer.from_pretrained(folder{trust})
model = AutoModelForCausalLM.from_pretrained(folder{trust})
given = tokenizer("The quick brown fox", return_tensors="pt")
tokens = model.generate(given.input_ids, attention_mask=given.attention_mask, max_new_tokens=20)
print(tokenizer.decode(tokens[0]))
"""


def require(model: PreTrainedModel) -> None:
    """Raises `UsageError` for a model that needs code which cannot be written for it."""
    if _code.is_needed(model):
        _code.require(model)


def write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, weights: str, source: Source
) -> list[str]:
    """Weights of that number format, config, tokenizer, and code where it is needed."""
    copied = models.twin(model, getattr(torch, weights))
    if _code.is_needed(model):
        _code.add(copied, folder)
    copied.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return []


def open(folder: Path) -> Runtime:
    """The model in a process of its own, which cannot import this package."""

    def logits(tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B L V"]:
        with tempfile.TemporaryDirectory() as place:
            given, found = Path(place, "tokens.npy"), Path(place, "logits.npy")
            np.save(given, tokens.cpu().numpy())
            quiet = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": place, "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
            done = subprocess.run(  # noqa: S603 (this Python, a file of ours)
                [sys.executable, "-P", _plain.__file__, folder, given, found],
                env=os.environ | quiet,
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode != 0:
                said = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
                raise QualityError(f"plain transformers cannot open the folder: {said[-1]}")
            return torch.from_numpy(np.load(found))

    return logits


def versions() -> Mapping[str, str]:
    """Of the packages that wrote and opened it."""
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def usage(folder: Path) -> str:
    """Python that opens the folder, for its card."""
    return _USAGE.format(trust=", trust_remote_code=True" if (folder / _code.FILE).exists() else "")
