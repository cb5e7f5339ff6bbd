"""What the hashes cost: seconds of opening SmolLM2-135M with and without them, and their share of a run.

    python benchmarks/hashing.py

The model is saved in float32 (540 MB) and opened in turns with its hashes checked and not, from a warm disk cache. The
run is the demo with a quarter of its tokens, so that its share is more than the demo's. Bars: 1 s, and 2 % of the run.
Beside the seconds stand those of this process alone, and the load: on a busy machine it waits for others.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _record import record, summary

from sparsekd import files, models, pipeline, teacher
from sparsekd.recipe import load_recipe

REPEATS = 5
QUARTER = ("corpus.num_blocks=25", "compress.num_tokens=2048", "evaluate.max_tokens=1024")


class Seconds(NamedTuple):
    wall: float
    own: float


def main() -> None:
    loads: dict[Callable[[Path], None], list[Seconds]] = {models.require_whole: [], lambda folder: None: []}
    hashing: list[Seconds] = []
    run: list[Seconds] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models.save(*models.load(), folder / "model")
        for _ in range(1 + REPEATS):  # the first warms up
            for models.require_whole, seconds in loads.items():
                files._HASHES.clear()  # each file is hashed once in a process
                timed(models.load, seconds)(str(folder / "model"))
        files._HASHES.clear()
        models.require_whole = next(iter(loads))
        files.file_sha256 = timed(files.file_sha256, hashing)
        teacher.weights_hash = timed(teacher.weights_hash, hashing)
        timed(pipeline.run, run)(load_recipe(str(folder / "model"), QUARTER), folder / "run")
    figures: dict[str, Any] = {"threads": torch.get_num_threads(), "load_average": os.getloadavg()[0]}
    for kind in ("wall", "own"):
        checked, unchecked = (summary([getattr(one, kind) for one in found[1:]]) for found in loads.values())
        spent, total = sum(getattr(one, kind) for one in hashing), getattr(run[0], kind)
        more = {"load_checked": checked, "load_unchecked": unchecked, "more": checked["median"] - unchecked["median"]}
        figures[f"{kind}_seconds"] = more | {"run": total, "hashing": spent, "share_of_run": spent / total}
    wall = figures["wall_seconds"]
    bars = {"load_within_1_s": wall["more"] <= 1, "run_within_2_percent": wall["share_of_run"] <= 0.02}
    record("hashing", {"settings": QUARTER, **figures, "bars": bars})


def timed(function: Callable[..., Any], seconds: list[Seconds]) -> Callable[..., Any]:
    """The function, which adds how long each of its calls takes."""

    def call(*given: Any) -> Any:
        wall, own = time.perf_counter(), time.process_time()
        found = function(*given)
        seconds.append(Seconds(time.perf_counter() - wall, time.process_time() - own))
        return found

    return call


if __name__ == "__main__":
    main()
