"""The same computation in two processes, and on another device."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny import compute_in_float32
from transformers import PreTrainedModel


def in_two_processes(function: Callable[[], Any], folder: Path) -> list[Any]:
    """What a function of a module returns in each of two gloo processes, which meet in an empty folder."""
    torch.multiprocessing.spawn(_run, (function, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def _run(rank: int, function: Callable[[], Any], folder: str) -> None:
    compute_in_float32()
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.save(function(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def layers_away(model: PreTrainedModel) -> set[int]:
    """Which of a Llama's layers are on `cpu:0`, which stands for a GPU: empty when all are at home."""
    away: set[int] = set()

    def moved(self: torch.nn.Module, place: torch.device) -> torch.nn.Module:
        (away.add if place == torch.device("cpu", 0) else away.discard)(id(self))
        return self

    inner: Any = model.base_model
    for layer in inner.layers:
        layer.to = moved.__get__(layer)
    return away
