"""The memory figure that a run reports."""

import subprocess
import sys

import torch


def test_peak_memory_is_this_process_s_own() -> None:
    """The system's own count starts from what the process had that started this one."""
    large = torch.ones(250_000_000)  # a gigabyte
    code = "from sparsekd.run import peak_memory_bytes; print(peak_memory_bytes())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 50e6 < int(told) < large.numel() * 4
