"""`sparsekd bench`: how fast models serve, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsekd.cli import options, printing
from sparsekd.cli.options import AsJson, Device, Models


def command(
    model: Models,
    batch: Annotated[str, typer.Option(metavar="A,B", help="Prompts at once.")] = "1,16,64",
    length: Annotated[str, typer.Option(metavar="A,B", help="Tokens of each prompt.")] = "128,512,1024",
    runtime: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="torch, compile, onnx, openvino, llama.cpp.  [default: those installed]"),
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="A,B", help="float32, bfloat16, float16.")] = "float32,bfloat16",
    attention: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="sdpa, eager, flash_attention_2.  [default: those that are there]"),
    ] = None,
    minutes: Annotated[float, typer.Option(help="How long it may take; what matters most comes first.", min=0)] = 5.0,
    precision: Annotated[
        float, typer.Option(help="Half of a ratio's interval, as a share of it, at which a cell ends.", min=0)
    ] = 0.02,
    out: Annotated[Path | None, typer.Option(help="File for all that was measured (.json).")] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Time to first token and per token, memory and bytes of models, which take turns; the first is the reference."""
    from sparsekd import bench, files
    from sparsekd.console import Console
    from sparsekd.report import speed

    printing.quiet()
    plan = bench.Plan(
        options.words("--runtime", runtime, bench.RUNTIMES) if runtime else bench.installed(),
        options.words("--dtype", dtype, bench.DTYPES),
        options.words("--attention", attention, bench.ATTENTIONS) if attention else bench.attentions_here(),
        options.counts("--batch", batch),
        options.counts("--length", length),
    )
    names, console = options.model_names(model), Console()
    for one in plan.runtimes:
        bench.require(one, names)
    found = bench.compare(
        names,
        plan,
        minutes=minutes,
        precision=precision,
        device=device or "auto",
        say=console.say,
        warn=console.warn,
    )
    if out is not None:
        files.write_json(out, found)
    if as_json:
        printing.print_json(found)
        return
    printing.print_tables(speed.bench(found))
    for line in (*speed.left_out(found), *(f"not installed: {line}" for line in bench.not_installed())):
        print(line)
