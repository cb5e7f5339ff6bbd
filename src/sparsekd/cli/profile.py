"""`sparsekd profile`: where the time of models goes, and how much could be gained."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from sparsekd.cli import options, printing
from sparsekd.cli.options import AsJson, Device, Models


def command(
    model: Models,
    batch: Annotated[int, typer.Option(help="Prompts at once.", min=1)] = 16,
    length: Annotated[int, typer.Option(help="Tokens of each prompt.", min=1)] = 128,
    decode: Annotated[bool, typer.Option("--decode", help="Of the tokens after the prompts, not of these.")] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    attention: Annotated[
        str, typer.Option(metavar="A,B", help="sdpa, eager, flash_attention_2; the first is profiled for the bound.")
    ] = "sdpa,eager",
    trace: Annotated[
        Path | None, typer.Option(help="New folder for Chrome traces, one for each model and attention.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for profile.json and profile.svg.")] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Time by kind of work, Amdahl's bound and what of it is achieved; the first model is the dense one."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch is imported: its profiler says when it starts
    from sparsekd import bench, models
    from sparsekd.console import Console
    from sparsekd.device import place
    from sparsekd.report import speed

    printing.quiet()
    attentions = options.words("--attention", attention, bench.ATTENTIONS)
    placement, names = place(device or "auto", dtype), options.model_names(model)
    bench.require_new(trace)
    loaded = {name: models.load(name, dtype=placement.dtype, device=placement.device)[0] for name in names}
    shape = bench.Shape(batch, length)
    found = bench.profile(loaded, shape, attentions, decode=decode, trace=trace, say=Console().say)
    printing.keep(out, "profile", found, speed.picture)
    if as_json:
        printing.print_json(found)
        return
    printing.print_tables(speed.profile(found))
