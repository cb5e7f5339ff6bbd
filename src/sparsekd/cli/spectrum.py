"""`sparsekd spectrum`: how much of each MLP matrix is used, or what each width of each MLP costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsekd.cli import options, printing
from sparsekd.cli.options import AsJson, Device, Reduction, Revision, Set, Target


def command(
    target: Target,
    reduction: Reduction = None,
    set_: Set = None,
    out: Annotated[Path | None, typer.Option(help="Folder for spectrum.json and spectrum.svg.")] = None,
    revision: Revision = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """How much of each MLP matrix is used, and what a uniform cut would cost: the recipe's method on its corpus.

    With compress.method=neurons: what each width of each MLP is predicted to cost, and the width that it would get.
    """
    from sparsekd import files, pipeline
    from sparsekd.report import plots, tables

    printing.quiet()
    found = pipeline.spectrum(options.recipe_of(target, reduction, set_, revision, device))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        files.write_json(out / "spectrum.json", found)
        files.write_text(out / "spectrum.svg", plots.damage(found) if "mlps" in found else plots.spectrum(found))
    if as_json:
        printing.print_json(found)
        return
    printing.print_tables([tables.damage(found) if "mlps" in found else tables.spectrum(found)])
