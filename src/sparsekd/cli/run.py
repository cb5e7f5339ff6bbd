"""`sparsekd run`: everything. The verbs that are its first part, as `sparsekd compress`, are made by `until`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sparsekd.cli import options, printing
from sparsekd.cli.options import AsJson, Device, Devices, DryRun, Fresh, Out, Reduction, Resume, Revision, Set, Target
from sparsekd.errors import QualityError, UsageError
from sparsekd.recipe import Recipe


def until(stage: str, text: str) -> Callable[..., None]:
    """The `command` of a verb that runs up to a stage; `text` is its help."""

    def command(
        target: Target,
        reduction: Reduction = None,
        set_: Set = None,
        out: Out = None,
        resume: Resume = False,
        fresh: Fresh = False,
        dry_run: DryRun = False,
        devices: Devices = None,
        revision: Revision = None,
        device: Device = None,
        as_json: AsJson = False,
    ) -> None:
        recipe = options.recipe_of(target, reduction, set_, revision, device)
        run_until(stage, target, recipe, out, resume, fresh, dry_run, as_json, devices)

    command.__doc__ = text
    return command


def run_until(
    stage: str,
    target: str,
    recipe: Recipe,
    out: Path | None,
    resume: bool,
    fresh: bool,
    dry_run: bool,
    as_json: bool,
    devices: str | None = None,
) -> None:
    """Runs up to a stage, or tells what that would cost, here or on `devices`, and prints what came of it."""
    if resume and fresh:
        raise UsageError("--resume continues a run and --fresh removes it: give one of them")
    if devices is not None and not dry_run:
        raise UsageError("--devices only plans, for what is not here: give --dry-run with it")
    if dry_run:
        from sparsekd.run import estimate, plan_devices

        printing.quiet()
        if devices is None:
            printing.print_plan(estimate(recipe), as_json)
        else:
            printing.print_device_plan(plan_devices(recipe, devices), as_json)
        return
    from sparsekd import pipeline, report

    printing.quiet()
    folder = out or options.default_folder(target, recipe)
    try:
        summaries = pipeline.run(recipe, folder, until=stage, resume=resume, fresh=fresh)
    except QualityError:
        printing.print_report(report.gather(folder), folder, as_json)
        raise
    if not printing.prints_results():
        return
    if stage == "report":
        printing.print_report(report.gather(folder), folder, as_json)
    elif as_json:
        printing.print_json(summaries)
    else:
        print(f"done: {folder}")


command = until(
    "report",
    "Everything: corpus, cache, compress, distill, evaluate, report. A killed run continues when called again.",
)
