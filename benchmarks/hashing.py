"""What the hashes cost: seconds of opening SmolLM2-135M with and without them, and their share of a run.

    python benchmarks/hashing.py

The model is saved in float32 (540 MB) and opened in turns with its hashes checked and not, from a warm disk cache. The
run is the demo with a quarter of its tokens, so that its share is more than the demo's. Bars: 1 s, and 2 % of the run.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _record import record, summary

from sparsekd import files, models, pipeline, teacher
from sparsekd.recipe import load_recipe

REPEATS = 5
QUARTER = ("corpus.num_blocks=25", "compress.num_tokens=2048", "evaluate.max_tokens=1024")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models.save(*models.load(), folder / "model")
        checked = models.require_whole
        loads: dict[str, Callable[[Path], None]] = {"checked": checked, "unchecked": lambda folder: None}
        seconds: dict[str, list[float]] = {name: [] for name in loads}
        for _ in range(1 + REPEATS):  # the first warms up
            for name, require in loads.items():
                files._HASHES.clear()  # each file is hashed once in a process
                models.require_whole = require
                seconds[name].append(timed(lambda: models.load(str(folder / "model")))[0])
        models.require_whole = checked
        files._HASHES.clear()
        hashing: list[float] = []
        for module, function in ((files, "file_sha256"), (teacher, "weights_hash")):
            setattr(module, function, counted(getattr(module, function), hashing))
        recipe = load_recipe(str(folder / "model"), QUARTER)
        total = timed(lambda: pipeline.run(recipe, folder / "run"))[0]
    loading = {f"load_{name}_seconds": summary(found[1:]) for name, found in seconds.items()}
    more = loading["load_checked_seconds"]["median"] - loading["load_unchecked_seconds"]["median"]
    run = {"run_seconds": total, "hashing_seconds": sum(hashing), "hashing_share": sum(hashing) / total}
    bars = {"load_within_1_s": more <= 1, "run_within_2_percent": run["hashing_share"] <= 0.02}
    record(
        "hashing",
        {
            "threads": torch.get_num_threads(),
            **loading,
            "load_more_seconds": more,
            "settings": QUARTER,
            **run,
            "bars": bars,
        },
    )


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = function()
    return time.perf_counter() - start, found


def counted(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def call(*given: Any) -> Any:
        elapsed, found = timed(lambda: function(*given))
        seconds.append(elapsed)
        return found

    return call


if __name__ == "__main__":
    main()
