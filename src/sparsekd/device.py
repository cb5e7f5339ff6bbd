"""Where a model runs and in which number format, with the reason for the log."""

from __future__ import annotations

import os
import time
from typing import NamedTuple

import torch
import torch.distributed

from sparsekd.errors import UsageError


class Placement(NamedTuple):
    device: torch.device
    dtype: torch.dtype
    reason: str


def place(device: str = "auto", dtype: str = "auto") -> Placement:
    """Chooses device and dtype: a GPU in bfloat16 if there is one that knows it, else float32.

    bfloat16 is never chosen on a CPU: many run it a hundred times slower than float32. Of processes that a launcher
    started, each takes its own GPU. Raises `UsageError` for a device that is not there or a dtype that is not a
    floating point one.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from None
    if dtype != "auto":
        explicit = getattr(torch, dtype, None)
        if not isinstance(explicit, torch.dtype) or not explicit.is_floating_point:
            raise UsageError(f"model.dtype is {dtype!r}: expected auto, float32, bfloat16 or float16")
        return Placement(chosen, explicit, f"{dtype} as asked")
    if chosen.type == "cuda" and torch.cuda.is_bf16_supported():
        return Placement(chosen, torch.bfloat16, "bfloat16: this GPU supports it")
    return Placement(chosen, torch.float32, f"float32: the safe choice on {chosen.type}")


def rank_and_count() -> tuple[int, int]:
    """Which of the processes that work together this one is, and how many there are; (0, 1) alone."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def trains_in_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether a training's products are bfloat16, with weights and sums in float32: as asked, or on GPUs that know
    it. Never by default on a CPU."""
    return precision == "bfloat16" or (precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported())


def measured_flops(placement: Placement) -> float:
    """Floating point operations a second of a 1024-wide matrix product here, the best of three; for time estimates."""
    size = 1024
    a = torch.ones(size, size, device=placement.device, dtype=placement.dtype)
    best = 0.0
    for _ in range(4):
        start = time.perf_counter()
        float((a @ a)[0, 0])
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def peak_device_memory_bytes(device: torch.device) -> int | None:
    """The most of a GPU's memory that this process has held so far; None for a CPU, which has the host's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":  # which knows no peak, but what its driver has taken is seldom given back
        return torch.mps.driver_allocated_memory()
    return None
