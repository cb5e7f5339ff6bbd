"""The run directory: what made each stage's output, what may be reused, and the lock.

    <run>/  recipe.yaml  manifest.json  log.jsonl  run.lock
            corpus/  round-01/{cache,compressed,distilled,eval}/  round-02/...  report.json  report.html

Each stage folder has `inputs.json`, written first (what it is being made from), and `stage.json`, written last (what
came out). A folder with equal inputs and a `stage.json` is reused, one without is continued, and one with other
inputs stops the run naming the field that differs.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsekd import files
from sparsekd.console import Console
from sparsekd.device import peak_device_memory_bytes, place
from sparsekd.errors import DataError, MismatchError, UsageError
from sparsekd.processes import Processes
from sparsekd.recipe import Recipe, as_dict, as_yaml, load_recipe

_KIND = "sparsekd run"  # what makes a folder ours: many programs write a manifest.json, none with this in it
_FIRST_MOMENT = re.compile(r"run\.lock|manifest\.json\.tmp-\d+")  # what there is before the manifest
_OWN = re.compile(
    r"recipe\.yaml|log\.jsonl|corpus|dense|(round|generation)-\d+|arms|(report|reproduce-\w+)\.(json|html)"
)
_PACKAGES = ("sparsekd", "torch", "transformers", "tokenizers", "safetensors", "pyarrow", "numpy")


class Stage:
    """One stage's folder; `summary` is what an earlier call finished it with, or None."""

    def __init__(self, run: Run, name: str, inputs: dict[str, Any]):
        self._run, self.name, self.folder = run, name, run.folder / name
        self._start = time.monotonic()
        self._seconds_before = 0.0
        self._inputs = inputs
        self.summary: dict[str, Any] | None = None
        if (self.folder / "inputs.json").exists():
            _require_same(files.read_json(self.folder / "inputs.json"), inputs, self.folder)
            if (self.folder / "stage.json").exists():
                self.summary = files.read_json(self.folder / "stage.json")
                run.console.say(f"{name}: up to date")
                return
        run.console.say(f"{name} ...")
        if not run.processes.is_main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if not run.shared:  # else they may be the others' at work
            files.remove_temporaries(self.folder)
        files.write_json(self.folder / "inputs.json", inputs)

    def finish(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Writes what came out, with time and memory; from here on the stage is reused."""
        seconds = time.monotonic() - self._start
        on_device = peak_device_memory_bytes(self._run.placement.device)
        peaks = {"peak_memory_bytes": peak_memory_bytes(), "peak_device_memory_bytes": on_device}
        self.summary = summary | {"seconds": seconds} | peaks
        if self._run.processes.is_main:
            files.write_json(self.folder / "stage.json", self.summary)
            self._run.log("stage", name=self.name, seconds=seconds)
        return self.summary


class Run:
    """An open run directory; use as `with Run.open(...) as run`. One process holds it, or several share it.

    Of processes that a launcher started together, only the main one writes stages and speaks.
    """

    def __init__(self, folder: Path, recipe: Recipe, console: Console, shared: bool = False):
        self.folder, self.recipe, self.shared = folder, recipe, shared
        self.placement = place(recipe.device, recipe.model.dtype)
        self.processes = Processes(self.placement.device)
        self.console = console if self.processes.is_main else Console(quiet=True)

    @classmethod
    @contextmanager
    def open(
        cls,
        folder: Path,
        recipe: Recipe,
        console: Console,
        *,
        resume: bool = False,
        fresh: bool = False,
        shared: bool = False,
    ) -> Iterator[Run]:
        """Takes the folder for this recipe: an empty one, or one that holds a run of the same recipe.

        `resume` insists that there is a run to continue; `fresh` removes the one that is there; `shared` lets other
        processes into it that say so too, and leaves all as it is. Raises `UsageError` for a folder with other files
        or another process in it, `MismatchError` naming the field that differs.
        """
        run = cls(folder, recipe, console, shared)
        if not run.processes.is_main:
            run.processes.wait()
            yield run
            return
        exists = _is_run(folder)
        if not exists and folder.exists() and not _is_free(folder):
            raise UsageError(f"{folder} is not empty and holds no run: choose another --out")
        if resume and not exists:
            raise UsageError(f"{folder} holds no run to resume: leave --resume out, or give the right --out")
        has_recipe = (folder / "recipe.yaml").exists()
        if exists and has_recipe and not fresh:
            _require_same(_comparable(load_recipe(str(folder / "recipe.yaml"))), _comparable(recipe), folder)
        folder.mkdir(parents=True, exist_ok=True)
        with files.lock(folder / "run.lock", str(folder), shared=shared):
            if not shared:
                run._settle(exists, exists and has_recipe, fresh)
            run.processes.wait()
            yield run

    def _settle(self, exists: bool, has_recipe: bool, fresh: bool) -> None:
        """Removes what a killed process left, and with `fresh` the old run; writes what makes the folder ours."""
        files.remove_temporaries(self.folder, lambda name: name == "manifest.json" or bool(_OWN.fullmatch(name)))
        if fresh or not exists:  # the manifest first: from then on, killed or not, the folder is known as ours
            made_by = {"versions": versions(), "machine": machine()}
            files.write_json(self.folder / "manifest.json", {"kind": _KIND, "format": 1, **made_by})
        if fresh:
            for path in [path for path in self.folder.iterdir() if _OWN.fullmatch(path.name)]:
                files.remove(path)
        if fresh or not has_recipe:
            files.write_text(self.folder / "recipe.yaml", as_yaml(self.recipe))

    def stage(self, name: str, inputs: dict[str, Any]) -> Stage:
        return Stage(self, name, inputs)

    def log(self, event: str, **values: Any) -> None:
        """Appends an event to log.jsonl."""
        files.append_line(self.folder / "log.jsonl", {"time": round(time.time(), 3), "event": event, **values})


def _is_run(folder: Path) -> bool:
    """Whether the folder's manifest is one that a run wrote."""
    try:
        manifest = files.read_json(folder / "manifest.json")
    except (DataError, OSError):
        return False
    return isinstance(manifest, dict) and manifest.get("kind") == _KIND


def _is_free(folder: Path) -> bool:
    """Whether a folder is empty, but for what a run leaves that was killed in its first moment."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    return not names or ("run.lock" in names and all(_FIRST_MOMENT.fullmatch(name) for name in names))


def _comparable(recipe: Recipe) -> dict[str, Any]:
    """The recipe without what may change between two calls: the device changes numbers only by rounding."""
    return {key: value for key, value in as_dict(recipe).items() if key != "device"}


def _require_same(found: Any, wanted: Any, where: Path, name: str = "") -> None:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in found.keys() | wanted.keys():
            _require_same(found.get(key), wanted.get(key), where, f"{name}.{key}" if name else key)
    elif found != wanted:
        raise MismatchError(
            f"{where} holds another run: {name} is {found} there and {wanted} now; choose another --out, or replace "
            "it with --fresh"
        )


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying at once; a second one takes the usual way."""
    received: list[int] = []

    def handler(number: Any, frame: Any) -> None:
        if received:
            signal.signal(number, previous[number])
            os.kill(os.getpid(), number)
        received.append(number)

    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def peak_memory_bytes() -> int:
    """The most memory this process has held so far; it never falls."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where getrusage counts in the process that started this one
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1])  # type: ignore[index]
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


def machine() -> dict[str, Any]:
    """What kind of machine, without the names of host or user."""
    return {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()}
