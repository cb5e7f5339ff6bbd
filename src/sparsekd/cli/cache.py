"""`sparsekd cache`: the first part of a run, up to the teacher's distributions, by one process or by several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from sparsekd.cli import options, printing
from sparsekd.cli.options import AsJson, Device, DryRun, Fresh, Out, Reduction, Resume, Revision, Set, Target
from sparsekd.cli.run import run_until
from sparsekd.errors import UsageError

if TYPE_CHECKING:
    from sparsekd.corpus import Share


def command(
    target: Target,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Be process I (from 1) of N that fill the cache together.")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Unite what all N processes have written.")] = False,
    reduction: Reduction = None,
    set_: Set = None,
    out: Out = None,
    resume: Resume = False,
    fresh: Fresh = False,
    dry_run: DryRun = False,
    revision: Revision = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Run until the teacher's distributions are cached; or, with --shard and --merge, by several processes."""
    recipe = options.recipe_of(target, reduction, set_, revision, device)
    if shard is None and not merge:
        run_until("cache", target, recipe, out, resume, fresh, dry_run, as_json)
        return
    if (shard is not None and merge) or fresh or dry_run:
        raise UsageError("--shard and --merge go with no other of --shard, --merge, --fresh, --dry-run")
    from sparsekd import pipeline

    printing.quiet()
    folder = out or options.default_folder(target, recipe)
    if shard is not None:
        summary = pipeline.cache_share(recipe, folder, _share(shard))
    else:
        summary = pipeline.merge_cache(recipe, folder)
    printing.print_json({"cache": summary}) if as_json else print(f"done: {folder}")


def _share(shard: str) -> Share:
    from sparsekd.corpus import Share

    number, slash, count = shard.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise UsageError(f"--shard is {shard}: expected I/N with I from 1 to N, for example 2/8")
    return Share(int(number), int(count))
