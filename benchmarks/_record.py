"""Writes a benchmark's figures to benchmarks/results/NAME.json with what is needed to run it again."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from sparsekd.run.directory import versions

RESULTS = Path(__file__).parent / "results"


def record(name: str, figures: dict[str, Any], *, show: bool = True) -> None:
    """Saves and prints `figures` with the command, the commit, the processor and the versions."""
    result = {"command": _command(), "commit": head(), "processor": _processor(), "versions": versions(), **figures}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    if show:
        print(json.dumps(result, indent=1))


def origin() -> dict[str, str | None]:
    """What a row says of where it comes from."""
    return {"versions": joined(versions()), "command": _command(), "commit": head()}


def joined(versions: dict[str, str] | None) -> str | None:
    """Versions as a row has them; None where they were not noted."""
    return ", ".join(f"{name} {version}" for name, version in versions.items()) if versions else None


def head() -> str:
    """The commit, and whether the package differs from it."""
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(["git", "status", "--porcelain", "src"], capture_output=True, text=True, check=False)
    return commit.stdout.strip() + (" with changes in src" if changed.stdout.strip() else "")


def _command() -> str:
    # a folder of this machine says nothing elsewhere
    return shlex.join(["python", *("DATA" if Path(word).is_absolute() else word for word in sys.argv)])


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} cores of {names[0]}" if names else platform.processor()


def summary(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"min": ordered[0], "median": ordered[len(ordered) // 2], "max": ordered[-1]}
