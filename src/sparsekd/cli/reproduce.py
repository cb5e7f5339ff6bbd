"""`sparsekd reproduce`: one of the paper's experiments, its claims beside what was found."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from sparsekd.cli import options, printing
from sparsekd.cli.options import AsJson, Device, DryRun, Fresh, Resume, Revision, Set, Target


def command(
    experiment: Annotated[
        str,
        typer.Argument(
            help="The paper's table II to VIII or X, or methods, controls, recovery, svd.", metavar="EXPERIMENT"
        ),
    ],
    target: Target,
    seeds: Annotated[
        str | None, typer.Option(metavar="A,B", help="Seeds of data order and sampling.  [default: 42,123,456]")
    ] = None,
    rates: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", help="Learning rates that every arm is tried with first.  [default: 3e-5,1e-4,3e-4]"
        ),
    ] = None,
    only: Annotated[
        str | None, typer.Option(metavar="A,B", help="Methods that experiment methods compares.  [default: all]")
    ] = None,
    set_: Set = None,
    out: Annotated[Path | None, typer.Option(help="Run directory.  [default: runs/reproduce-NAME]")] = None,
    resume: Resume = False,
    fresh: Fresh = False,
    dry_run: DryRun = False,
    revision: Revision = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """One of the paper's experiments on a model of yours, with controls: its claims, our ratios beside the paper's."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch is imported: its profiler says when it starts
    from sparsekd import reproduce
    from sparsekd.report import experiments

    printing.quiet()
    recipe = options.recipe_of(target, None, set_, revision, device)
    each_seed = None if seeds is None else options.numbers("--seeds", seeds, int)
    each_rate = None if rates is None else options.numbers("--rates", rates, float)
    methods = None if only is None else only.split(",")
    if dry_run:
        planned = reproduce.preview(experiment, recipe, each_seed, each_rate, methods)
        if as_json:
            printing.print_json(planned.as_dict())
            return
        print(f"arms          {', '.join(planned.arms)}")
        print(f"seeds         {','.join(map(str, planned.seeds))}")
        printing.print_costs(planned.costs)
        return
    folder = out or Path("runs") / f"reproduce-{options.name_of(target, recipe)}"
    found = reproduce.reproduce(
        experiment, recipe, folder, seeds=each_seed, rates=each_rate, only=methods, resume=resume, fresh=fresh
    )
    if not printing.prints_results():
        return
    if as_json:
        printing.print_json(found)
        return
    printing.print_tables(experiments.all_tables(found))
    for note in found.get("notes", ()):
        print(note)
