"""The run directory: what made each stage's output, what may be reused, and the lock.

    <run>/  recipe.yaml  manifest.json  log.jsonl  run.lock
            corpus/  round-01/{cache,compressed,distilled,eval}/  round-02/...  report.json  report.html

Each stage folder has `inputs.json`, written first (what it is being made from), and `stage.json`, written last (what
came out, and the hashes of the folder's files). A folder with equal inputs and a `stage.json` is reused if its files
are what they were, one without is continued, and one with other inputs stops the run naming the field that differs,
unless it is an evaluation, which is made again. The run's manifest lists the finished stages, so that one whose
`stage.json` was lost is not taken for one that was only begun. Inputs are what may decide a result beyond rounding; the
versions of Python and packages stand beside them, and a change only warns.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from sparsekd import files, models, records
from sparsekd.console import Console
from sparsekd.device import is_faster_in_bfloat16, measured_before, memory_named, place, slow_kernels
from sparsekd.errors import UsageError
from sparsekd.recipe import Recipe, as_yaml
from sparsekd.records import Record
from sparsekd.run.machine import machine, versions
from sparsekd.run.processes import Processes
from sparsekd.run.reading import (
    FINISHED,
    KIND,
    RECIPE,
    Inputs,
    as_now,
    difference_of,
    is_free,
    is_run,
    other_run,
    read_inputs,
    read_manifest,
    settings_in,
)
from sparsekd.run.stage import Stage

_WAY_OUT = (
    "lower its batch_size or corpus.seq_len; compress.offload and distill.gradient_checkpointing need less as well"
)
_IS_FASTER = "is_faster_in_bfloat16"  # in the manifest: what the processor's measurement said when the run began
_OWN = re.compile(
    r"recipe\.yaml|log\.jsonl|corpus|dense|(round|generation)-\d+|arms|(report|reproduce-\w+)\.(json|html)"
)


class Run:
    """An open run directory; use as `with Run.open(...) as run`. One process holds it, or several share it.

    Of processes that a launcher started together, only the main one writes stages and speaks.
    """

    def __init__(self, folder: Path, recipe: Recipe, console: Console, processes: Processes, shared: bool):
        self.folder, self.recipe, self.shared = folder, recipe, shared
        self.latest = "the beginning"  # stage that was begun
        self.placement = place(recipe.device, recipe.model.dtype)
        self.processes = processes
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
        or another process in it, and for processes that were started together with different recipes.
        """
        processes = Processes(place(recipe.device, "float32").device)
        processes.require_alike(recipe)
        with measured_before(processes.of_main(lambda: _is_faster(folder, fresh))):
            run = cls(folder, recipe, console, processes, shared)
            with run._held(resume, fresh) if processes.is_main else nullcontext():
                processes.wait()
                with processes.heard(), memory_named(lambda: run.latest, _WAY_OUT):
                    yield run

    @contextmanager
    def _held(self, resume: bool, fresh: bool) -> Iterator[None]:
        """In it the folder is there and this process has it."""
        exists = is_run(self.folder)
        if not exists and self.folder.exists() and not is_free(self.folder):
            raise UsageError(
                f"{self.folder} is not empty and holds no run, or its manifest.json is damaged: choose another --out"
            )
        if resume and not exists:
            raise UsageError(f"{self.folder} holds no run to resume: leave --resume out, or give the right --out")
        self.folder.mkdir(parents=True, exist_ok=True)
        advice = slow_kernels(self.placement.device)
        if advice is not None:
            self.console.say(advice)
        with files.lock(self.folder / "run.lock", str(self.folder), shared=self.shared):
            if not self.shared:
                self._settle(exists, fresh)
            yield

    def _settle(self, exists: bool, fresh: bool) -> None:
        """Removes what a killed process left, and with `fresh` the old run; writes what makes the folder ours."""
        files.remove_temporaries(self.folder, lambda name: name == "manifest.json" or bool(_OWN.fullmatch(name)))
        if fresh or not exists:  # the manifest first: from then on, killed or not, the folder is known as ours
            made_by = {"versions": versions(), "machine": machine(), _IS_FASTER: is_faster_in_bfloat16()}
            records.write(self.folder / "manifest.json", {"kind": KIND, "format": 1, **made_by})
        if fresh:
            for path in [path for path in self.folder.iterdir() if _OWN.fullmatch(path.name)]:
                files.remove(path)

    def keep_recipe(self, settings: Mapping[str, Record]) -> None:
        """Writes recipe.yaml, after making sure that no stage there was made with other `settings`, by its folder:
        what the recipe alone says of its inputs. Raises `MismatchError` naming stage and field, and leaves all as it
        was; evaluations have no settings, for they follow the recipe."""
        for name, wanted in settings.items():
            found = read_inputs(self.folder / name)
            difference = None if found is None else difference_of(settings_in(as_now(found), wanted), wanted)
            if difference is not None:
                raise other_run(self.folder / name, difference)
        text = as_yaml(self.recipe)
        path = self.folder / "recipe.yaml"
        if not self.processes.is_main:
            return
        if not (path.exists() and path.read_bytes() == text.encode()):
            files.write_text(path, text)
        manifest = read_manifest(self.folder)
        if manifest.get(RECIPE) != files.sha256(text):
            records.write(self.folder / "manifest.json", manifest | {RECIPE: files.sha256(text)})

    def stage(self, name: str, inputs: Inputs, *, replaces: bool = False) -> Stage:
        """The stage of that folder; with `replaces` one that was made from other inputs is made again, else it raises
        `MismatchError`."""
        return Stage(self, name, inputs, replaces)

    def note(self, name: str, *, is_finished: bool) -> None:
        """Keeps in the manifest that a stage is finished, or is no longer."""
        if self.shared or not self.processes.is_main:
            return
        manifest = read_manifest(self.folder)
        known = set(manifest.get(FINISHED, ()))
        if (name in known) != is_finished:
            records.write(self.folder / "manifest.json", manifest | {FINISHED: sorted(known ^ {name})})

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


def _is_faster(folder: Path, fresh: bool) -> bool:
    """The processor at products in bfloat16: as a run in the folder measured when it began, else as measured now."""
    known = read_manifest(folder).get(_IS_FASTER) if is_run(folder) and not fresh else None
    return is_faster_in_bfloat16() if known is None else known
