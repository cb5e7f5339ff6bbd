"""Save and restore a training state: safetensors and JSON in one folder that appears whole or not at all.

checkpoint/  model.safetensors  best.safetensors  optimizer.safetensors  state.json (with the others' sha256)
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsekd import files
from sparsekd.errors import DataError


def unique_state(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of a model by name, tied ones once; what training changes."""
    return dict(model.named_parameters())


@torch.no_grad()
def load_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copies values into the parameters in place, so that ties and an optimizer's references hold."""
    for name, parameter in unique_state(model).items():
        parameter.copy_(state[name])


def save(
    folder: Path, model: nn.Module, best: dict[str, Tensor], optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Replaces the checkpoint in `folder`; `state` is what else the loop needs, as JSON values."""
    moments = {
        f"{index}.{name}": value
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    size = sum(t.numel() * t.element_size() for t in [*unique_state(model).values(), *best.values(), *moments.values()])
    files.require_space(folder, size, "a checkpoint")
    parts = {"model": unique_state(model), "best": best, "optimizer": moments}
    with files.atomic_path(folder) as temporary:
        temporary.mkdir()
        for name, tensors in parts.items():
            save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, temporary / f"{name}.safetensors")
        hashes = {name: files.file_sha256(temporary / f"{name}.safetensors") for name in parts}
        rng = base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode()
        files.write_json(temporary / "state.json", state | {"sha256": hashes, "torch_rng": rng})


def restore(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Fills model and optimizer and returns the best weights and the loop's state; None when there is no checkpoint.

    Raises `DataError` naming the file when one does not match its hash.
    """
    if not folder.exists():
        return None
    state = files.read_json(folder / "state.json")
    parts = {}
    for name, expected in state["sha256"].items():
        path = folder / f"{name}.safetensors"
        if not path.exists() or files.file_sha256(path) != expected:
            raise DataError(f"{path} is damaged or missing; start the training again with --fresh")
        parts[name] = load_file(path)
    load_state(model, parts["model"])
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in parts["optimizer"].items():
        index, _, name = key.partition(".")
        moments.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
    torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(state["torch_rng"])), dtype=torch.uint8))
    return parts["best"], state
