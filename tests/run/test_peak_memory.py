"""The memory figures that a run reports."""

import subprocess
import sys
from typing import Any

import torch

from sparsekd.device import peak_device_memory_bytes


def test_peak_memory_is_this_process_s_own() -> None:
    """The system's own count starts from what the process had that started this one."""
    large = torch.ones(250_000_000)  # a gigabyte
    code = "from sparsekd.run.machine import peak_memory_bytes; print(peak_memory_bytes())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 50e6 < int(told) < large.numel() * 4


def test_a_device_with_memory_of_its_own_is_asked(monkeypatch: Any) -> None:
    assert peak_device_memory_bytes(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: {"cuda:1": 7}[str(device)])
    assert peak_device_memory_bytes(torch.device("cuda:1")) == 7
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 8)
    assert peak_device_memory_bytes(torch.device("mps")) == 8
