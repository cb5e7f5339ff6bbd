"""What compressed models buy in PyTorch: the bars of "How fast must the models be", from models that take turns.

    python benchmarks/speed.py DENSE NAME=FOLDER... [--minutes 4]

Prompts of 16 x 128 and decoding at batch 1, float32, SDPA. For every compressed model: how many times as fast as the
dense one, beside Amdahl's bound (prefill, from a profile in the same session) and beside what the bytes of the weights
allow (decode); memory and disk beside the parameters. The dense model is saved as a folder first, so that all are
opened and stored in the same way. For quiet machines: about 8 minutes on 2 cores for a dense model and three others.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from _record import record

from sparsekd import bench, models

PREFILL, DECODE = bench.Shape(16, 128), bench.Shape(1, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dense")
    parser.add_argument("compressed", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--minutes", type=float, default=4.0)
    given = parser.parse_args()
    titles = {folder: name for name, _, folder in (one.partition("=") for one in given.compressed)}
    with tempfile.TemporaryDirectory() as temporary:
        dense = str(Path(temporary) / "dense")
        model, tokenizer = models.load(given.dense, dtype=torch.float32)
        models.save(model, tokenizer, Path(dense))
        del model
        measure({dense: "dense"} | titles, given.minutes)


def measure(titles: dict[str, str], minutes: float) -> None:
    folders = list(titles)
    plan = bench.Plan(["torch"], ["float32"], ["sdpa"], [DECODE.batch, PREFILL.batch], [PREFILL.length])
    timed = bench.compare(folders, plan, minutes=minutes, say=print, warn=print)
    loaded = {folder: models.load(folder, dtype=torch.float32)[0] for folder in folders}
    profiled = bench.profile(loaded, PREFILL, ["sdpa"], say=print)
    cells = {(cell["batch"], cell["length"]): cell["models"] for cell in timed["cells"]}
    bounds = {one["model"]: one for one in profiled["bounds"]}
    dense, dense_folder = loaded[folders[0]], folders[0]
    figures: dict[str, Any] = {"threads": timed["threads"], "left_out": timed["left_out"]}
    figures["shares_of_the_dense_model"] = profiled["rows"][0]["shares"]
    for folder in folders[1:]:
        model, bound = loaded[folder], bounds[folder]
        found: dict[str, Any] = {"mlp_arithmetic": bound["arithmetic_reduction"], "prefill_bound": bound["bound"]}
        found["prefill_in_the_profile"] = bound["times_as_fast"] | {"of_the_bound": bound["achieved"]}
        if PREFILL in cells:
            faster = cells[PREFILL][folder]["times_as_fast"]["first_token"]
            found["prefill"] = faster | {"of_the_bound": faster["median"] / bound["bound"]}
        if DECODE in cells:
            faster = cells[DECODE][folder]["times_as_fast"]["per_token"]
            allowed = bench.bytes_per_step(dense, 4) / bench.bytes_per_step(model, 4)
            found["decode"] = faster | {"bytes_allow": allowed, "of_the_bytes": faster["median"] / allowed}
            sizes = {one: cells[DECODE][one]["peak_bytes"] - cells[DECODE][one]["before_bytes"] for one in folders}
            smaller = models.num_parameters(dense) / models.num_parameters(model)
            memory = sizes[dense_folder] / sizes[folder]
            disk = timed["models"][dense_folder]["disk_bytes"] / timed["models"][folder]["disk_bytes"]
            found |= {"parameters": smaller, "memory": memory, "memory_of_the_arithmetic": memory / smaller}
            found |= {"disk": disk, "disk_of_the_arithmetic": disk / smaller}
        figures[titles[folder]] = found
    named = {"cells": timed["cells"], "profile": profiled["rows"]}
    record("speed", figures | _titled(named, titles))


def _titled(value: Any, titles: dict[str, str]) -> Any:
    """The same with titles in place of this machine's folders."""
    if isinstance(value, dict):
        return {titles.get(key, key): _titled(one, titles) for key, one in value.items()}
    if isinstance(value, list):
        return [_titled(one, titles) for one in value]
    return titles.get(value, value) if isinstance(value, str) else value


if __name__ == "__main__":
    main()
