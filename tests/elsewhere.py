"""The same computation in two processes, and on another device."""

import functools
import multiprocessing
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
from tiny import compute_in_float32
from transformers import PreTrainedModel


def in_two_processes(function: Callable[[], Any]) -> list[Any]:
    """What a function of a module returns in each of two gloo processes, which wait for the next one."""
    folder, pair = _pair()
    for process in pair:
        process.send(sys.path)
        process.send(function)
    for process in pair:
        assert process.poll(300), "a process hangs"
        problem = process.recv()
        assert problem is None, problem
    return [torch.load(f"{folder.name}/{rank}.pt") for rank in range(2)]


@functools.cache
def _pair() -> tuple[tempfile.TemporaryDirectory[str], list[Any]]:
    context, folder, pair = multiprocessing.get_context("spawn"), tempfile.TemporaryDirectory(), []
    for rank in range(2):
        here, there = context.Pipe()
        context.Process(target=_serve, args=(rank, folder.name, there), daemon=True).start()
        pair.append(here)
    return folder, pair


def _serve(rank: int, folder: str, asked: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    compute_in_float32()
    while True:
        sys.path[:] = asked.recv()
        try:
            torch.save(asked.recv()(), f"{folder}/{rank}.pt")
            asked.send(None)
        except Exception:
            asked.send(traceback.format_exc())


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
