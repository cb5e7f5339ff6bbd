"""Format `hf`: a folder that `AutoModelForCausalLM.from_pretrained` opens, without any code of ours where the form
allows it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from sparsekd.export.checking import Runtime, Tolerance
from sparsekd.export.source import Source

WEIGHTS: Mapping[str, Tolerance] = {"float32": Tolerance(1e-3, 0.999, 1e-4)}


def require(model: PreTrainedModel) -> None:
    pass


def write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, weights: str, source: Source
) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def open(folder: Path) -> Runtime:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return lambda tokens: model(input_ids=tokens).logits


def versions() -> Mapping[str, str]:
    return {"torch": torch.__version__, "transformers": transformers.__version__}
