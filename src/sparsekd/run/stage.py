"""A stage's folder in a run: reused, continued or made again."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from sparsekd import files, records
from sparsekd.device import peak_device_memory_bytes
from sparsekd.errors import DataError
from sparsekd.records import Record
from sparsekd.run.machine import peak_memory_bytes, versions
from sparsekd.run.reading import (
    FILES,
    VERSIONS,
    Inputs,
    Summary,
    answered_for,
    as_now,
    difference_of,
    other_run,
    read_inputs,
    read_summary,
)
from sparsekd.run.rounds import ARMS

if TYPE_CHECKING:
    from sparsekd.run.directory import Run

_PART_OF = "part_of"  # in what a stage keeps until it is finished: which stage that is


class Stage:
    """One stage's folder; `summary` is what an earlier call finished it with, or None."""

    def __init__(self, run: Run, name: str, inputs: Inputs, replaces: bool = False):
        self._run, self.name, self.folder = run, name, run.folder / name
        self._inputs = inputs
        run.latest = name
        self._start = time.monotonic()
        self.summary: Summary | None = None
        found = read_inputs(self.folder)
        difference = None if found is None else difference_of(as_now(found), inputs)
        if found is not None and difference is None:
            is_arm = name.startswith(f"{ARMS}/")  # of which only the figures are asked for, unless it is opened
            self.summary = read_summary(self.folder, warn=run.console.warn, needs_model=not is_arm)
            self._warn_of_versions()
        elif difference is not None and not replaces:
            raise other_run(self.folder, difference)
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
            records.write(self.folder / "inputs.json", inputs | {VERSIONS: versions()})

    def _warn_of_versions(self) -> None:
        then, now = records.read(self.folder / "inputs.json").get(VERSIONS, {}), versions()
        changed = [
            f"{name} {version}, now {now.get(name)}" for name, version in then.items() if now.get(name) != version
        ]
        if changed:
            self._run.console.warn(f"{self.name} was made with {', '.join(changed)}: it is kept as it is")

    def finish(self, summary: Summary) -> Summary:
        """Writes what came out, with time, memory and hashes; from here on the stage is reused."""
        seconds = time.monotonic() - self._start
        on_device = peak_device_memory_bytes(self._run.placement.device)
        peaks = {"peak_memory_bytes": peak_memory_bytes(), "peak_device_memory_bytes": on_device}
        self.summary = summary | {"seconds": seconds} | peaks
        if self._run.processes.is_main:
            listed = records.listing(self.folder, answered_for(self.folder))
            records.write(self.folder / "stage.json", self.summary | {FILES: listed})
            self._run.note(self.name, is_finished=True)
            self._run.log("stage", name=self.name, seconds=seconds)
        return self.summary

    def keep(self, name: str, part: Record) -> None:
        """Writes a part of what will come out, for a later call if this one does not finish."""
        records.write(self.folder / name, part | {_PART_OF: self._mark(name)})

    def kept(self, name: str) -> Record | None:
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
