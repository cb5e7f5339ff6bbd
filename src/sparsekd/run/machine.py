"""What made a result: the versions of packages, the kind of machine, and the memory that was used."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
from pathlib import Path

_PACKAGES = ("sparsekd", "torch", "transformers", "tokenizers", "safetensors", "pyarrow", "numpy")


_FORGET_PEAK = b"5"  # see proc(5)


def peak_memory_bytes(process: int | None = None) -> int:
    """The most memory a process has held so far, by default this one; it falls only by `reset_peak_memory`."""
    return _held("VmHWM", process)


def memory_bytes() -> int:
    """What this process holds now; where only Linux tells it, the most so far."""
    return _held("VmRSS", None)


def reset_peak_memory(process: int | None = None) -> None:
    """Lets the peak begin anew from what is held now, which only Linux does."""
    path = Path(f"/proc/{process or 'self'}/clear_refs")
    if path.exists():
        descriptor = os.open(path, os.O_WRONLY)
        os.write(descriptor, _FORGET_PEAK)
        os.close(descriptor)


def _held(name: str, process: int | None) -> int:
    status = Path(f"/proc/{process or 'self'}/status")
    if status.exists():  # Linux, where getrusage counts in the process that started this one
        return 1024 * int(re.search(rf"{name}:\s*(\d+) kB", status.read_text())[1])  # type: ignore[index]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def versions() -> dict[str, str]:
    """Python and the packages that decide numbers."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine() -> dict[str, str | int | None]:
    """What kind of machine, without the names of host or user."""
    return {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()}
