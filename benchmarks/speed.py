"""What compressed models buy: the bars of "How fast must the models be", from models that take turns.

    python benchmarks/speed.py DENSE NAME=MODEL... [--minutes 4] [--formats onnx openvino gguf] [--rows speed]

Prompts of 16 x 128 and decoding at batch 1, in PyTorch (float32, SDPA) and, exported in these formats, in ONNX Runtime,
OpenVINO and llama.cpp. For every compressed model and runtime: how many times as fast as the dense one, beside Amdahl's
bound (prefill, from a profile of PyTorch in the same session) and beside what the bytes of the weights allow (decode);
memory and disk beside the parameters. The dense model is saved as a folder first, so that all are opened and stored in
the same way. For quiet machines: about 8 minutes on 2 cores for a dense model and three others in PyTorch, and 2 more
for each export.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from _record import record

from sparsekd import bench, export, models

PREFILL, DECODE = bench.Shape(16, 128), bench.Shape(1, 128)
RUNTIMES = {"onnx": "onnx", "openvino": "openvino", "gguf": "llama.cpp"}
WEIGHTS = {"gguf": "f32"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("compressed", nargs="+", metavar="NAME=MODEL", help="a folder or a run")
    parser.add_argument("--minutes", type=float, default=4.0, help="for each runtime")
    parser.add_argument("--formats", nargs="*", choices=RUNTIMES, default=[])
    parser.add_argument("--rows", default="speed", help="name of the file of results")
    given = parser.parse_args()
    named = {name: export.locate(model) for name, _, model in (one.partition("=") for one in given.compressed)}
    with tempfile.TemporaryDirectory() as temporary:
        dense = Path(temporary) / "dense"
        model, tokenizer = models.load(given.dense, dtype=torch.float32)
        models.save(model, tokenizer, dense)
        del model, tokenizer
        named = {"dense": export.Source(str(dense))} | named
        found = measure(named, given.minutes)
        for format_ in given.formats:
            found[RUNTIMES[format_]] = exported(named, format_, Path(temporary), given.minutes, found["bounds"])
    record(given.rows, found)


def measure(named: dict[str, export.Source], minutes: float) -> dict[str, Any]:
    """In PyTorch; with the bounds that hold for all runtimes."""
    titles = {source.name: title for title, source in named.items()}
    loaded = {title: models.load(source.name, dtype=torch.float32)[0] for title, source in named.items()}
    profiled = bench.profile(loaded, PREFILL, ["sdpa"], say=print)
    dense, *others = loaded
    bounds = {
        one["model"]: {
            "mlp_arithmetic": one["arithmetic_reduction"],
            "prefill_bound": one["bound"],
            "in_the_profile": one["times_as_fast"] | {"of_the_bound": one["achieved"]},
        }
        for one in profiled["bounds"]
    }
    for title in others:
        pair = (loaded[dense], loaded[title])
        by_bytes, by_number = ([count(model) for model in pair] for count in (_bytes, models.num_parameters))
        bounds[title] |= {"bytes_allow": by_bytes[0] / by_bytes[1], "parameters": by_number[0] / by_number[1]}
    del loaded
    found: dict[str, Any] = {"shares_of_the_dense_model": profiled["rows"][0]["shares"], "bounds": bounds}
    found["profile"] = profiled["rows"]
    return found | {"torch": compared(titles, "torch", minutes, bounds)}


def exported(
    named: dict[str, export.Source], format_: str, temporary: Path, minutes: float, bounds: dict[str, Any]
) -> dict[str, Any]:
    titles = {}
    for title, source in named.items():
        folder = temporary / f"{title}-{format_}"
        model, tokenizer = models.load(source.name, dtype=torch.float32)
        export.export(model, tokenizer, format_, folder, source, weights=WEIGHTS.get(format_, "float32"))
        titles[str(folder)] = title
        print(f"  {title} as {format_}")
        del model
    return compared(titles, RUNTIMES[format_], minutes, bounds)


def compared(titles: dict[str, str], runtime: str, minutes: float, bounds: dict[str, Any]) -> dict[str, Any]:
    """What each model gains in a runtime, beside what it can."""
    plan = bench.Plan([runtime], ["float32"], ["sdpa"], [DECODE.batch, PREFILL.batch], [PREFILL.length])
    timed = bench.compare(list(titles), plan, minutes=minutes, say=print, warn=print)
    cells = {(cell["batch"], cell["length"]): cell["models"] for cell in timed["cells"]}
    dense, *others = titles
    found: dict[str, Any] = {"threads": timed["threads"], "left_out": timed["left_out"]}
    for name in others:
        bound, gained = bounds[titles[name]], {}
        if PREFILL in cells:
            faster = cells[PREFILL][name]["times_as_fast"]["first_token"]
            gained["prefill"] = faster | {"of_the_bound": faster["median"] / bound["prefill_bound"]}
        if DECODE in cells:
            faster = cells[DECODE][name]["times_as_fast"]["per_token"]
            gained["decode"] = faster | {"of_the_bytes": faster["median"] / bound["bytes_allow"]}
            held = [cells[DECODE][one]["peak_bytes"] - cells[DECODE][one]["before_bytes"] for one in (dense, name)]
            gained["memory"] = _beside(*held, bound["parameters"])
        gained["disk"] = _beside(*(timed["models"][one]["disk_bytes"] for one in (dense, name)), bound["parameters"])
        found[titles[name]] = gained
    for cell in timed["cells"]:
        cell["models"] = {titles[name]: one for name, one in cell["models"].items()}
    return found | {"cells": timed["cells"]}


def _bytes(model: Any) -> int:
    return bench.bytes_per_step(model, 4)


def _beside(dense: float, small: float, parameters: float) -> dict[str, float]:
    return {"times_as_small": dense / small, "of_the_arithmetic": dense / small / parameters}


if __name__ == "__main__":
    main()
