"""Models as folders for other runtimes: seconds, size, and how near each is to PyTorch, on one text.

    python benchmarks/exports.py --models smollm2-135m RUN --formats onnx openvino --weights float32 int8 int4

A row replaces that of the same model, format and number format in results/exports.json; `--text` is a text to compare
on, by default functions of Python's standard library.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _record import RESULTS, origin, record

from sparsekd import export, models
from sparsekd.errors import SparseKDError

KEY = ("model", "format", "weights", "text")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, help="names or folders of models, or runs")
    parser.add_argument("--formats", nargs="+", required=True)
    parser.add_argument("--weights", nargs="+", help="number formats; those that a format has not are left out")
    parser.add_argument("--text", type=Path)
    asked = parser.parse_args()
    for name in asked.models:
        source = export.locate(name)
        for format_name in asked.formats:
            has = list(export.format_named(format_name).WEIGHTS)
            for weights in [one for one in asked.weights or has[:1] if one in has]:
                keep(row(name, source, format_name, weights, asked.text))


def row(name: str, source: export.Source, format_name: str, weights: str, text: Path | None) -> dict[str, Any]:
    """Exports once; a format that refuses says why in the row."""
    start = time.perf_counter()
    model, tokenizer = models.load(source.name, dtype=torch.float32)  # anew: an export may change it
    loaded = time.perf_counter()
    content = None if text is None else text.read_text(encoding="utf-8")
    found: dict[str, Any] = {
        "model": Path(name).name,
        "format": format_name,
        "weights": weights,
        "text": text.name if text else "python",
        "parameters": models.num_parameters(model),
        "threads": torch.get_num_threads(),
    }
    used = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        try:
            made = export.export(
                model, tokenizer, format_name, Path(folder) / "out", source, weights=weights, text=content
            )
            found |= {key: made[key] for key in ("bytes", "comparison", "versions", "llama.cpp") if key in made}
        except SparseKDError as error:
            found["error"] = str(error)
    seconds, process = time.perf_counter() - loaded, time.process_time() - used
    return found | {"load_s": loaded - start, "export_s": seconds, "export_cpu_s": process, "origin": origin()}


def keep(new: dict[str, Any]) -> None:
    path = RESULTS / "exports.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    others = [old for old in rows if any(old[key] != new[key] for key in KEY)]
    record("exports", {"rows": [*others, new]}, show=False)
    print(json.dumps(new))


if __name__ == "__main__":
    main()
