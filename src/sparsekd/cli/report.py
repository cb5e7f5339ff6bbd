"""`sparsekd report`: what a finished run found, once more."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsekd.cli import printing
from sparsekd.cli.options import AsJson


def command(
    folder: Annotated[Path, typer.Argument(help="A run directory whose stages are finished.")], as_json: AsJson = False
) -> None:
    """Write report.json and report.html of a run again, and print its tables."""
    from sparsekd import report

    printing.print_report(report.write(folder), folder, as_json)
