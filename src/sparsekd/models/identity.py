"""What decides a model's answers, as hashes; two models with equal hashes are interchangeable."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsekd import files
from sparsekd.models.locating import locate, weight_files
from sparsekd.models.saving import EXPORTED, HASHES
from sparsekd.models.splitting import whole


def weights_hash(model: nn.Module) -> str:
    """sha256 of all parameters and buffers, by name, type, shape and bytes; the same for every container.
    All processes must call where the model is split over them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(whole(tensor).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def config_hash(model: PreTrainedModel) -> str:
    """Fingerprint of the config without where it was read from and by which version."""
    values = json.loads(model.config.to_json_string(use_diff=False))
    passing = {"architectures", "dtype", "torch_dtype", "transformers_version"}
    kept = {key: value for key, value in values.items() if key not in passing and not key.startswith("_")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def source_hash(name: str) -> str | None:
    """sha256 over the files of a local model; None for a Hub id, whose revision is its identity."""
    place = locate(name)
    folder = Path(place.source)
    if place.gguf:
        return files.file_sha256(folder / place.options["gguf_file"])
    if not folder.is_dir():
        return None
    weight_files(name, place, None)  # what an index names elsewhere would change unseen
    kinds = {".safetensors", ".json", ".txt", ".model", ".jinja"}
    listed = sorted(path for path in folder.iterdir() if path.suffix in kinds and path.name not in (HASHES, EXPORTED))
    return files.fingerprint({path.name: files.file_sha256(path) for path in listed})


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of what decides the tokenizer's ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()
