"""The command line, and a run from Python, as the end-to-end tests call them."""

import json
import sys
from pathlib import Path
from typing import Any

import sparsekd
from sparsekd import cli, pipeline


def run_cli(capsys: Any, monkeypatch: Any, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["sparsekd", *arguments])
    try:
        cli.main()
        code = 0
    except SystemExit as leave:
        code = int(leave.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def pipeline_run(recipe: Any, folder: Path, **options: Any) -> Any:
    try:
        return pipeline.run(recipe, folder, **options)
    except sparsekd.SparseKDError as error:
        if error.exit_code != 5:
            raise
        return json.loads((folder / "report.json").read_text())
