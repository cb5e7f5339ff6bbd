"""Format `dense`: a folder of the base's own architecture, whatever the model's form; for software that knows no other.

Low rank is multiplied out, and MLPs of several widths are filled up with zeros. It computes the same; what was gained
in size and speed is lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsekd import models
from sparsekd.export import hf
from sparsekd.export.checking import Runtime
from sparsekd.export.source import Source

WEIGHTS = hf.WEIGHTS


def require(model: PreTrainedModel) -> None:
    """Raises `UsageError` for a form that cannot be merged."""
    models.forms.require_mergeable(model)


def write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, weights: str, source: Source
) -> list[str]:
    """Weights of that number format, config and tokenizer; returns what merging has cost."""
    merged = models.forms.merged(model)
    hf.write(merged, tokenizer, folder, weights, source)
    here, dense, before = models.num_parameters(merged), models.forms.dense_sizes(model), models.num_parameters(model)
    if here == before:
        return [] if before < dense.model else ["as large and as fast as the dense model"]
    if here >= dense.model:
        return ["merged back: neither smaller nor faster than the dense model"]
    return [
        f"ordinary matrices of one width: {here / before - 1:.0%} larger than the model that was exported, and slower; "
        f"{1 - here / dense.model:.0%} smaller than the dense one"
    ]


def open(folder: Path) -> Runtime:
    """As format `hf`."""
    return hf.open(folder)


def versions() -> Mapping[str, str]:
    """As format `hf`."""
    return hf.versions()


def usage(folder: Path) -> str:
    """As format `hf`."""
    return hf.usage(folder)
