"""The run directory: what made each stage's output, what may be reused, and the lock.

    <run>/  recipe.yaml  manifest.json  log.jsonl  run.lock
            corpus/  round-01/{cache,compressed,distilled,eval}/  round-02/...  report.json  report.html

Each stage folder has `inputs.json`, written first (what it is being made from), and `stage.json`, written last (what
came out, and the hashes of the folder's files). A folder with equal inputs and a `stage.json` is reused if its files
are what they were, one without is continued, and one with other inputs stops the run naming the field that differs,
unless it is an evaluation, which is made again. The run's manifest lists the finished stages, so that one whose
`stage.json` was lost is not taken for one that was only begun. Inputs are what may decide a result beyond rounding;
the versions of Python and packages stand beside them, and a change only warns.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsekd import files, models, records
from sparsekd.console import Console
from sparsekd.device import memory_named, peak_device_memory_bytes, place
from sparsekd.errors import DataError, MismatchError, UsageError
from sparsekd.processes import Processes
from sparsekd.recipe import Recipe, as_yaml, load_recipe
from sparsekd.rounds import ARMS

_KIND = "sparsekd run"  # what makes a folder ours: many programs write a manifest.json, none with this in it
_FIRST_MOMENT = re.compile(r"run\.lock|manifest\.json\.tmp-\d+")  # what there is before the manifest
_OWN = re.compile(
    r"recipe\.yaml|log\.jsonl|corpus|dense|(round|generation)-\d+|arms|(report|reproduce-\w+)\.(json|html)"
)
_VERSIONS = "versions"  # in inputs.json, beside the inputs
_RECIPE = "recipe_sha256"  # in the run's manifest
_FINISHED = "finished"  # in the run's manifest: names of stages, by which a lost stage.json is known from none yet
_MANIFEST_LOST = "put back a copy of it, or start again with another --out"
_PART_OF = "part_of"  # in what a stage keeps until it is finished: which stage that is
_FILES = "files"  # in stage.json, beside the summary: sizes and hashes
_PACKAGES = ("sparsekd", "torch", "transformers", "tokenizers", "safetensors", "pyarrow", "numpy")


class Stage:
    """One stage's folder; `summary` is what an earlier call finished it with, or None."""

    def __init__(self, run: Run, name: str, inputs: dict[str, Any], replaces: bool = False):
        self._run, self.name, self.folder = run, name, run.folder / name
        self._inputs = inputs
        run.latest = name
        self._start = time.monotonic()
        self.summary: dict[str, Any] | None = None
        found = read_inputs(self.folder)
        difference = None if found is None else difference_of(found, inputs)
        if found is not None and difference is None:
            is_arm = name.startswith(f"{ARMS}/")  # of which only the figures are asked for, unless it is opened
            self.summary = read_summary(self.folder, warn=run.console.warn, needs_model=not is_arm)
            self._warn_of_versions()
        elif difference is not None and not replaces:
            raise _other_run(self.folder, difference)
        run.note(name, is_finished=self.summary is not None)
        if self.summary is not None:
            run.console.say(f"{name}: up to date")
            return
        run.console.say(f"{name} ..." if difference is None else f"{name}: again, {difference}")
        if not run.processes.is_main:
            return
        if difference is not None:
            files.remove(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not run.shared:  # else they may be the others' at work
            files.remove_temporaries(self.folder)
        if found is None or difference is not None:
            records.write(self.folder / "inputs.json", inputs | {_VERSIONS: versions()})

    def _warn_of_versions(self) -> None:
        then, now = records.read(self.folder / "inputs.json").get(_VERSIONS, {}), versions()
        changed = [
            f"{name} {version}, now {now.get(name)}" for name, version in then.items() if now.get(name) != version
        ]
        if changed:
            self._run.console.warn(f"{self.name} was made with {', '.join(changed)}: it is kept as it is")

    def finish(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Writes what came out, with time, memory and hashes; from here on the stage is reused."""
        seconds = time.monotonic() - self._start
        on_device = peak_device_memory_bytes(self._run.placement.device)
        peaks = {"peak_memory_bytes": peak_memory_bytes(), "peak_device_memory_bytes": on_device}
        self.summary = summary | {"seconds": seconds} | peaks
        if self._run.processes.is_main:
            listed = records.listing(self.folder, _answered_for(self.folder))
            records.write(self.folder / "stage.json", self.summary | {_FILES: listed})
            self._run.note(self.name, is_finished=True)
            self._run.log("stage", name=self.name, seconds=seconds)
        return self.summary

    def keep(self, name: str, part: dict[str, Any]) -> None:
        """Writes a part of what will come out, for a later call if this one does not finish."""
        records.write(self.folder / name, part | {_PART_OF: self._mark(name)})

    def kept(self, name: str) -> dict[str, Any] | None:
        """A part that was kept; None where there is none or, with a warning, where it is damaged or another stage's."""
        path = self.folder / name
        if not path.exists():
            return None
        try:
            part = records.read(path)
            if part.pop(_PART_OF, None) == self._mark(name):
                return part
            reason = f"{path} was not made by this stage"
        except DataError as error:
            reason = str(error)
        self._run.console.warn(f"{reason}; it is made again")
        return None

    def _mark(self, name: str) -> str:
        return files.fingerprint({"inputs": self._inputs, "name": name})


class Run:
    """An open run directory; use as `with Run.open(...) as run`. One process holds it, or several share it.

    Of processes that a launcher started together, only the main one writes stages and speaks.
    """

    def __init__(self, folder: Path, recipe: Recipe, console: Console, shared: bool = False):
        self.folder, self.recipe, self.shared = folder, recipe, shared
        self.latest = "the beginning"  # stage that was begun
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
        """Takes the folder for this recipe: an empty one, or one that holds a run, whose stages say what fits.

        `resume` insists that there is a run to continue; `fresh` removes the one that is there; `shared` lets other
        processes into it that say so too, and leaves all as it is. Raises `UsageError` for a folder with other files
        or another process in it.
        """
        run = cls(folder, recipe, console, shared)
        if not run.processes.is_main:
            run.processes.wait()
            with memory_named(run._out_of_memory):
                yield run
            return
        exists = _is_run(folder)
        if not exists and folder.exists() and not _is_free(folder):
            raise UsageError(
                f"{folder} is not empty and holds no run, or its manifest.json is damaged: choose another --out"
            )
        if resume and not exists:
            raise UsageError(f"{folder} holds no run to resume: leave --resume out, or give the right --out")
        folder.mkdir(parents=True, exist_ok=True)
        with files.lock(folder / "run.lock", str(folder), shared=shared):
            if not shared:
                run._settle(exists, fresh)
            run.processes.wait()
            with memory_named(run._out_of_memory):
                yield run

    def _out_of_memory(self) -> str:
        return (
            f"out of memory in {self.latest}: lower its batch_size or corpus.seq_len; compress.offload and "
            "distill.gradient_checkpointing need less as well"
        )

    def _settle(self, exists: bool, fresh: bool) -> None:
        """Removes what a killed process left, and with `fresh` the old run; writes what makes the folder ours."""
        files.remove_temporaries(self.folder, lambda name: name == "manifest.json" or bool(_OWN.fullmatch(name)))
        if fresh or not exists:  # the manifest first: from then on, killed or not, the folder is known as ours
            made_by = {"versions": versions(), "machine": machine()}
            records.write(self.folder / "manifest.json", {"kind": _KIND, "format": 1, **made_by})
        if fresh:
            for path in [path for path in self.folder.iterdir() if _OWN.fullmatch(path.name)]:
                files.remove(path)

    def keep_recipe(self, settings: Mapping[str, dict[str, Any]]) -> None:
        """Writes recipe.yaml, after making sure that no stage there was made with other `settings`, by its folder:
        what the recipe alone says of its inputs. Raises `MismatchError` naming stage and field, and leaves all as it
        was; evaluations have no settings, for they follow the recipe."""
        for name, wanted in settings.items():
            found = read_inputs(self.folder / name)
            difference = None if found is None else difference_of(_settings_in(found, wanted), wanted)
            if difference is not None:
                raise _other_run(self.folder / name, difference)
        text = as_yaml(self.recipe)
        path = self.folder / "recipe.yaml"
        if not self.processes.is_main:
            return
        if not (path.exists() and path.read_text(encoding="utf-8") == text):
            files.write_text(path, text)
        manifest = read_manifest(self.folder)
        if manifest.get(_RECIPE) != files.sha256(text):
            records.write(self.folder / "manifest.json", manifest | {_RECIPE: files.sha256(text)})

    def stage(self, name: str, inputs: dict[str, Any], *, replaces: bool = False) -> Stage:
        """The stage of that folder; with `replaces` one that was made from other inputs is made again, else it raises
        `MismatchError`."""
        return Stage(self, name, inputs, replaces)

    def note(self, name: str, *, is_finished: bool) -> None:
        """Keeps in the manifest that a stage is finished, or is no longer."""
        if self.shared or not self.processes.is_main:
            return
        manifest = read_manifest(self.folder)
        known = set(manifest.get(_FINISHED, ()))
        if (name in known) != is_finished:
            records.write(self.folder / "manifest.json", manifest | {_FINISHED: sorted(known ^ {name})})

    def commit(self, name: str, revision: str | None) -> str | None:
        """The commit of a Hub model that this run began with; None for a local one. Recorded on first use, so that a
        branch that moves meanwhile does not change the model."""
        path = self.folder / "manifest.json"
        manifest = read_manifest(self.folder)
        known = manifest.setdefault("commits", {})
        key = name if revision is None else f"{name}@{revision}"
        if key not in known:
            commit = models.commit_of(name, revision)
            if commit is None:
                return None
            known[key] = commit
            if self.processes.is_main:
                records.write(path, manifest)
        return known[key]

    def log(self, event: str, **values: Any) -> None:
        """Appends an event to log.jsonl."""
        files.append_line(self.folder / "log.jsonl", {"time": round(time.time(), 3), "event": event, **values})


def _is_run(folder: Path) -> bool:
    """Whether the folder's manifest is one that a run wrote; raises `DataError` when it was and is damaged."""
    path = folder / "manifest.json"
    if not (path.is_file() and _KIND.encode() in path.read_bytes()):
        return False
    return records.read(path, way_out=_MANIFEST_LOST).get("kind") == _KIND


def read_manifest(folder: Path, needed: Iterable[str] = ()) -> dict[str, Any]:
    """A run's manifest; raises `DataError` when it is damaged, another record or lacks a key that is `needed`."""
    path = folder / "manifest.json"
    manifest = records.read(path, needed, _MANIFEST_LOST)
    if manifest.get("kind") != _KIND:
        raise DataError(f"{path} is damaged: it is not what a run writes there; {_MANIFEST_LOST}")
    return manifest


def read_recipe(folder: Path) -> Recipe:
    """The recipe that a run was last called with; raises `DataError` when its file is not what was written, or the
    manifest, which says so, is another run's."""
    path, manifest = folder / "recipe.yaml", folder / "manifest.json"
    written = read_manifest(folder).get(_RECIPE)
    if written is not None and written != files.file_sha256(path):
        raise DataError(
            f"{path} is damaged: its content is not what was written, or {manifest} is another run's; run the same "
            "command again, which writes both"
        )
    return load_recipe(str(path))


def _is_free(folder: Path) -> bool:
    """Whether a folder is empty, but for what a run leaves that was killed in its first moment."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    return not names or ("run.lock" in names and all(_FIRST_MOMENT.fullmatch(name) for name in names))


def read_inputs(folder: Path) -> dict[str, Any] | None:
    """What the stage in `folder` was made from; None where none was begun. Raises `DataError` when it is damaged, or
    missing where something was made: of what, nobody knows then."""
    path = folder / "inputs.json"
    if not path.exists():
        if _has_output(folder):
            raise DataError(f"{path} is missing; {way_out(folder)}")
        return None
    return {key: value for key, value in records.read(path, (), way_out(folder)).items() if key != _VERSIONS}


def _has_output(folder: Path) -> bool:
    """Whether there is more than what a process left that was killed before it wrote anything whole."""
    inside = folder.iterdir() if folder.is_dir() else ()
    return any(not files.is_temporary(path) and not (path / "inputs.json").exists() for path in inside)


def finished_stages(folder: Path) -> list[str]:
    """The stages of a run that were finished, by their names; a run of an earlier version knows of none."""
    return read_manifest(folder).get(_FINISHED, [])


def read_summary(
    folder: Path,
    needed: Iterable[str] = (),
    warn: Callable[[str], None] = lambda text: None,
    *,
    needs_model: bool = True,
) -> dict[str, Any] | None:
    """What the stage in `folder` was finished with; None where none is.

    Raises `DataError` naming the first of its files that is missing or not what was written, or the key of those
    `needed` that the summary lacks; a stage of an earlier version has no hashes, which `warn` hears of. Without
    `needs_model` its model, which is large, may have been removed.
    """
    path = folder / "stage.json"
    if not path.exists():
        return None
    summary = records.read(path, needed, way_out(folder))
    if _FILES in summary:
        records.require(path, summary.pop(_FILES), way_out(folder), None if needs_model else "model")
    else:
        warn(f"{folder} was finished by an earlier version, which kept no hashes: its files are not checked")
    return summary


def way_out(folder: Path) -> str:
    """What to do about a damaged stage."""
    return f"remove {folder} to make the stage again"


def _answered_for(folder: Path) -> Iterator[Path]:
    """The files that a finished stage has to have, whole. Logs are not read again; corpus and cache list their own
    files in manifests, because these may be added to; a stage inside another one answers for itself."""
    yield folder / "inputs.json"
    if not (folder / "manifest.json").exists():
        yield from (path for path in folder.glob("*.json") if path.name not in ("inputs.json", "stage.json"))
        yield from (path for path in (folder / "model").rglob("*") if path.is_file())


def _other_run(folder: Path, difference: str) -> MismatchError:
    return MismatchError(
        f"{folder} holds another run: {difference}; choose another --out, remove that folder to make the stage again, "
        "or replace the whole run with --fresh"
    )


def difference_of(found: Any, wanted: Any, name: str = "") -> str | None:
    """The first field in which the two differ, with both values; None where they are equal."""
    if not (isinstance(found, dict) and isinstance(wanted, dict)):
        return None if found == wanted else f"{name} is {found} there and {wanted} now"
    fields = dict.fromkeys([*wanted, *found])
    differences = (difference_of(found.get(key), wanted.get(key), f"{name}.{key}" if name else key) for key in fields)
    return next((difference for difference in differences if difference is not None), None)


def _settings_in(inputs: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Of a stage's inputs the keys that the settings `wanted` have, and of each of its sections the same."""
    found = {key: inputs.get(key) for key in wanted}
    return {
        key: {inner: section.get(inner) for inner in wanted[key]}
        if isinstance(section, dict) and isinstance(wanted[key], dict)
        else section
        for key, section in found.items()
    }


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
