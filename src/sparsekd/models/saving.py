"""Saved models: a folder of safetensors and JSON, with the hashes of its files in `sparsekd.json`."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsekd import files, records
from sparsekd.models import forms
from sparsekd.models.locating import locate, raw_config
from sparsekd.models.precision import cast

HASHES = "sparsekd.json"  # beside config.json
EXPORTED = "export.json"  # the same, of an exported model, beside what it was made from and compared with


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes model and tokenizer as a folder of safetensors and JSON that `load` opens; all of it or nothing.

    `dtype` changes the number format of the model's weights, in place, before; None leaves it. Raises `ResourceError`
    when the disk is too small, `DataError` when a masked model has lost zeros.
    """
    folder = Path(folder)
    forms.check(model)
    if dtype is not None:
        cast(model, dtype)
    files.require_space(folder, sum(p.numel() * p.element_size() for p in model.parameters()), "the model")
    with files.atomic_path(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        paths = [path for path in temporary.rglob("*") if path.is_file()]
        records.write(temporary / HASHES, {"format": 1, "files": records.listing(temporary, paths)})


def require_whole(folder: Path) -> None:
    """Raises `DataError` naming the first file of a model that was saved or exported here which is missing or not what
    was written; of other folders nothing is known."""
    for path in (folder / HASHES, folder / EXPORTED):
        if not path.exists():
            continue
        way_out = f"get the model again or, if you have changed it yourself, remove {path}"
        records.require(path, records.read(path, ("files",), way_out)["files"], way_out)


def checkpoint_dtype(name: str, revision: str | None = None) -> torch.dtype:
    """The number format that a model's weights are stored in; float32 for GGUF, which is unpacked to it."""
    place = locate(name)
    if place.gguf:
        return torch.float32
    raw = raw_config(place, revision)
    stored = getattr(torch, str(raw.get("dtype") or raw.get("torch_dtype")), None)
    return stored if isinstance(stored, torch.dtype) else torch.float32
