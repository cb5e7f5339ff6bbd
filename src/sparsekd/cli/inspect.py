"""`sparsekd inspect`: what a folder is, and whether it is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsekd.cli import printing
from sparsekd.cli.options import AsJson


def command(
    path: Annotated[Path, typer.Argument(help="A run, a model, a corpus or a cache.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all of it: damage, and of a cache its coverage, duplicates, tail.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """What is this folder, is it whole, and what made it? Reads only."""
    from sparsekd.run import inspection

    printing.quiet()
    if not verify:
        printing.print_facts(inspection.describe(path), as_json)
        return
    facts = inspection.verify(path)
    printing.print_facts(facts, as_json)
    inspection.require_sound(facts, path)
