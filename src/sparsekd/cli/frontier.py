"""`sparsekd frontier`: what models say against what they cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsekd.cli import printing
from sparsekd.cli.options import AsJson


def command(
    run: Annotated[list[str], typer.Argument(metavar="RUN...", help="Finished runs of the same dense model.")],
    format_: Annotated[
        str | None,
        typer.Option("--format", help="openvino, onnx or gguf: what has fewer bits.  [default: the first installed]"),
    ] = None,
    text: Annotated[str | None, typer.Option(help="An evaluation text of the first run.  [default: its first]")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the text to score, in windows spread over it.", min=2)] = 4096,
    minutes: Annotated[float, typer.Option(help="How long timing may take, beside the exports.", min=0)] = 5.0,
    out: Annotated[Path | None, typer.Option(help="Folder for frontier.json and frontier.svg.")] = None,
    as_json: AsJson = False,
) -> None:
    """Perplexity against speed and bytes: the dense model and those of runs, as they are and quantised."""
    from sparsekd import pipeline
    from sparsekd.console import Console
    from sparsekd.report import frontier

    printing.quiet()
    found = pipeline.frontier(
        [Path(one) for one in run], text, Console(), format_=format_, tokens=tokens, minutes=minutes
    )
    printing.keep(out, "frontier", found, frontier.picture)
    if as_json:
        printing.print_json(found)
        return
    printing.print_tables(frontier.tables(found))
    for line in found["left_out"]:
        print(f"left out: {line}")
