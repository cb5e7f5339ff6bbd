"""The command line: parse, call one function, print. Heavy imports live inside the verbs.

Results go to stdout, as text or with `--json` as one object; progress and messages go to stderr.
Exit codes: 0 ok, 1 our bug, 2 usage, 3 data, 4 resource, 5 the result is worse than before, 130/143 stopped by signal.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsekd.errors import DataError, SparseKDError, UsageError
from sparsekd.recipe import PRESETS, Recipe, load_recipe

app = typer.Typer(
    help="Make a trained language model smaller and faster, taught by nothing but itself.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Target = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE|MODEL", help="A recipe (.yaml), preset, or model: folder, Hub id, .gguf, smollm2-135m."
    ),
]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="a.b=c", help="Change a recipe value; repeatable.")]
Reduction = Annotated[float | None, typer.Option(help="Fraction of the MLP parameters to remove: compress.reduction.")]
Revision = Annotated[str | None, typer.Option(help="Commit, tag or branch of a Hub model: model.revision.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps: the recipe's device.")]
Out = Annotated[Path | None, typer.Option(help="Run directory.  [default: runs/NAME-REDUCTION]")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --out; an error if there is none.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Remove the run in --out and start again.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print parameters, bytes, memory and time; do nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def _stage_verb(verb: str, stage: str, text: str) -> None:
    def command(
        target: Target,
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
        recipe = _recipe(target, reduction, set_, revision, device)
        _run_stages(stage, target, recipe, out, resume, fresh, dry_run, as_json)

    app.command(verb, help=text)(command)


_stage_verb(
    "run",
    "report",
    "Everything: corpus, cache, compress, distill, evaluate, report. A killed run continues when called again.",
)
_stage_verb("corpus", "corpus", "Run until the token blocks are there.")


@app.command()
def cache(
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
    recipe = _recipe(target, reduction, set_, revision, device)
    if shard is None and not merge:
        _run_stages("cache", target, recipe, out, resume, fresh, dry_run, as_json)
        return
    if (shard is not None and merge) or fresh or dry_run:
        raise UsageError("--shard and --merge go with no other of --shard, --merge, --fresh, --dry-run")
    from sparsekd import pipeline

    _quiet()
    folder = out or _default_folder(target, recipe)
    if shard is not None:
        summary = pipeline.cache_part(recipe, folder, _part(shard))
    else:
        summary = pipeline.merge_cache(recipe, folder)
    _print_json({"cache": summary}) if as_json else print(f"done: {folder}")


def _part(shard: str) -> Any:
    from sparsekd.corpus import Share

    number, slash, count = shard.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise UsageError(f"--shard is {shard}: expected I/N with I from 1 to N, for example 2/8")
    return Share(int(number), int(count))


_stage_verb("compress", "compress", "Run until the MLPs are low-rank.")
_stage_verb("distill", "distill", "Run until the compressed model is trained.")


@app.command()
def reproduce(
    experiment: Annotated[
        str, typer.Argument(help="The paper's table II to VI, or controls, recovery, svd.", metavar="EXPERIMENT")
    ],
    target: Target,
    seeds: Annotated[str, typer.Option(metavar="A,B", help="Seeds of data order and sampling.")] = "42,123,456",
    rates: Annotated[
        str, typer.Option(metavar="A,B", help="Learning rates that every arm is tried with first.")
    ] = "3e-5,1e-4,3e-4",
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
    from sparsekd.device import rank_and_count
    from sparsekd.report import experiments, tables
    from sparsekd.reproduce import estimate_of
    from sparsekd.reproduce import reproduce as run_experiment

    _quiet()
    recipe = _recipe(target, None, set_, revision, device)
    each_seed, each_rate = _numbers("--seeds", seeds, int), _numbers("--rates", rates, float)
    if dry_run:
        planned = estimate_of(experiment, recipe, each_seed, each_rate)
        if as_json:
            _print_json(planned)
            return
        print(f"arms          {', '.join(planned['arms'])}")
        print(f"seeds         {seeds}")
        _show_costs(planned)
        return
    folder = out or Path("runs") / f"reproduce-{_name(target, recipe)}"
    found = run_experiment(experiment, recipe, folder, seeds=each_seed, rates=each_rate, resume=resume, fresh=fresh)
    rank, _ = rank_and_count()
    if rank > 0:  # results are printed once
        return
    if as_json:
        _print_json(found)
        return
    for title, header, rows in experiments.all_tables(found):
        _print_table(tables.console_table(title, header, rows))


def _numbers(option: str, text: str, kind: Any) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} is {text}: expected numbers with commas between them") from None


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="A model, dense or compressed: folder, Hub id, .gguf, smollm2-135m.")],
    text: Annotated[
        list[Path] | None, typer.Option(help="A text to measure on (.txt, .jsonl, .parquet); repeatable.")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="A model of the same tokenizer to compare with.")] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="A,B", help="Tasks of lm-evaluation-harness; local_... read files in --root.")
    ] = None,
    root: Annotated[Path | None, typer.Option(help="Folder of the local tasks' files.")] = None,
    limit: Annotated[int | None, typer.Option(help="Rows of each task; all by default.", min=1)] = None,
    context: Annotated[int, typer.Option(help="Tokens in a window.", min=2)] = 512,
    stride: Annotated[int, typer.Option(help="Tokens between two windows.", min=1)] = 256,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens spread over each text; all by default.", min=2)] = None,
    revision: Revision = None,
    device: Device = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto, float32, bfloat16 or float16: the recipe's model.dtype.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with model or teacher.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Perplexity, calibration, agreement with a teacher and harness tasks of any model, with standard errors."""
    from sparsekd import corpus, models
    from sparsekd.device import place
    from sparsekd.evaluate import harness
    from sparsekd.recipe import Corpus, Text, model_name

    _quiet()
    names = [name.strip() for name in tasks.split(",")] if tasks else []
    if not text and not names:
        raise UsageError("there is nothing to evaluate on: give --text FILE, --tasks NAME or both")
    if teacher is not None and not text:
        raise UsageError("--teacher compares on texts: give --text FILE as well")
    if stride > context:
        raise UsageError(f"--stride is {stride}: expected at most --context ({context})")
    folder = str(root) if root else None
    harness.check(names, folder)
    titles = _titles(text or [])
    contents = {title: corpus.read_text(Text(path=str(path)), Corpus()) for path, title in titles.items()}
    placement = place(device or "auto", dtype or "auto")
    how: dict[str, Any] = {
        "dtype": placement.dtype,
        "device": placement.device,
        "trust_remote_code": trust_remote_code,
    }
    model = model_name(model)
    loaded, tokenizer = models.load(model, revision=revision, **how)
    compared = {model: loaded}
    if teacher is not None:
        teacher = model_name(teacher, [model])
        reference, its_tokenizer = models.load(teacher, **how)
        if models.tokenizer_hash(its_tokenizer) != models.tokenizer_hash(tokenizer):
            raise DataError(
                f"--teacher {teacher}: its tokenizer is not that of {model}, so their tokens do not compare"
            )
        compared = {teacher: reference, model: loaded}
    options = {"context": context, "stride": stride, "max_tokens": max_tokens}
    measured = _measure_texts(compared, tokenizer, contents, teacher, options)
    scores = harness.run_tasks(loaded, tokenizer, names, root=folder, limit=limit) if names else {}
    found = {"models": measured, "tasks": {model: {name: score.as_dict() for name, score in scores.items()}}}
    _show_evaluation(found, as_json)


@app.command()
def spectrum(
    target: Target,
    reduction: Reduction = None,
    set_: Set = None,
    out: Annotated[Path | None, typer.Option(help="Folder for spectrum.json and spectrum.svg.")] = None,
    revision: Revision = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """How much of each MLP matrix is used, and what a uniform cut would cost: the recipe's method on its corpus."""
    from sparsekd import files, pipeline
    from sparsekd.report import plots, tables

    _quiet()
    found = pipeline.spectrum(_recipe(target, reduction, set_, revision, device))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        files.write_json(out / "spectrum.json", found)
        files.write_text(out / "spectrum.svg", plots.spectrum(found))
    if as_json:
        _print_json(found)
        return
    _print_table(tables.console_table(tables.spectrum_title(found), tables.SPECTRUM_HEADER, tables.spectrum(found)))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A run directory whose stages are finished.")], as_json: AsJson = False
) -> None:
    """Write report.json and report.html of a run again, and print its tables."""
    from sparsekd.report import write

    _show(write(folder), folder, as_json)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A run, a model, a corpus or a cache.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all of it: damage, and of a cache its coverage, duplicates, tail.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """What is this folder, is it whole, and what made it? Reads only."""
    from sparsekd.run import inspection

    _quiet()
    if not verify:
        _print_facts(inspection.describe(path), as_json)
        return
    facts = inspection.verify(path)
    _print_facts(facts, as_json)
    inspection.require_sound(facts, path)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Versions, device, free disk, and which optional packages are here."""
    from sparsekd.run import diagnose

    _print_facts(diagnose(), as_json)


def _titles(paths: list[Path]) -> dict[Path, str]:
    """What each text is called: its file name, or the whole path where two share one."""
    names = [path.name for path in paths]
    return {path: path.name if names.count(path.name) == 1 else str(path) for path in paths}


def _measure_texts(
    compared: dict[str, Any], tokenizer: Any, contents: dict[str, str], teacher: str | None, options: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """What `measure` says, by model and text, with a bar for each text."""
    from sparsekd.console import Console
    from sparsekd.corpus import encode
    from sparsekd.evaluate import measure

    results: dict[str, dict[str, Any]] = {name: {} for name in compared}
    for title, content in contents.items():
        num_tokens = min(options["max_tokens"] or sys.maxsize, len(encode(tokenizer, content)))
        expected = num_tokens * options["context"] // options["stride"] * len(compared)
        with Console().bar(f"evaluating {title}", expected) as bar:
            found = measure(compared, tokenizer, content, teacher=teacher, on_tokens=bar.advance, **options)
        for name, measurement in found.items():
            results[name][title] = measurement.as_dict()
    return results


def _show_evaluation(found: dict[str, Any], as_json: bool) -> None:
    from sparsekd.report import tables

    if as_json:
        _print_json(found)
        return
    for title, header, rows in tables.evaluation({"ratios": {}} | found):
        _print_table(tables.console_table(title, header, rows))


def _run_stages(
    until: str,
    target: str,
    recipe: Recipe,
    out: Path | None,
    resume: bool,
    fresh: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    if resume and fresh:
        raise UsageError("--resume continues a run and --fresh removes it: give one of them")
    if dry_run:
        from sparsekd.run import estimate

        _quiet()
        _show_plan(estimate(recipe), as_json)
        return
    from sparsekd import pipeline
    from sparsekd.device import rank_and_count
    from sparsekd.errors import QualityError

    _quiet()
    folder = out or _default_folder(target, recipe)
    try:
        summaries = pipeline.run(recipe, folder, until=until, resume=resume, fresh=fresh)
    except QualityError:
        _show_report(folder, as_json)
        raise
    rank, _ = rank_and_count()
    if rank > 0:  # results are printed once
        return
    if until == "report":
        _show_report(folder, as_json)
    elif as_json:
        _print_json(summaries)
    else:
        print(f"done: {folder}")


def _recipe(
    target: str, reduction: float | None, set_: list[str] | None, revision: str | None, device: str | None
) -> Recipe:
    given = {"compress.reduction": reduction, "model.revision": revision, "device": device}
    overrides = [f"{name}={value}" for name, value in given.items() if value is not None]
    return load_recipe(target, (*(set_ or []), *overrides))


def _default_folder(target: str, recipe: Recipe) -> Path:
    reduction = (recipe.rounds or [recipe.compress.reduction])[-1]
    return Path("runs") / f"{_name(target, recipe)}-{reduction:g}"


def _name(target: str, recipe: Recipe) -> str:
    if target in PRESETS:
        return target
    return Path(target).stem if target.endswith((".yaml", ".yml")) else Path(recipe.model.name).name


def _show_report(folder: Path, as_json: bool) -> None:
    from sparsekd.report import gather

    _show(gather(folder), folder, as_json)


def _show(gathered: dict[str, Any], folder: Path, as_json: bool) -> None:
    from sparsekd.report import tables

    if as_json:
        _print_json(gathered)
        return
    plan = gathered["compression"]
    _print_table(tables.console_table("Parameters", ["", "before", "after", "removed"], tables.sizes(plan)))
    if not gathered["recipe"]["evaluate"]["texts"]:
        print("perplexity: not measured, for the recipe names no text in evaluate.texts")
    _show_evaluation(gathered["evaluation"], as_json=False)
    if len(gathered["rounds"]) > 1:
        _print_table(tables.console_table("Rounds", *tables.rounds(gathered)))
    seconds = [[name, tables.duration(value)] for name, value in gathered["seconds"].items()]
    total = ["total", tables.duration(sum(gathered["seconds"].values()))]
    _print_table(tables.console_table("Time", ["stage", ""], [*seconds, total]))
    print(f"peak memory {tables.memory(gathered)}")
    print(f"model:  {folder / gathered['model_folder']}   (open it with sparsekd.load)")
    print(f"report: {folder / 'report.html'}")


def _show_plan(planned: dict[str, Any], as_json: bool) -> None:
    from sparsekd.report import tables

    if as_json:
        _print_json(planned)
        return
    structure = planned["compression"]
    rows = [row[:5] for row in tables.matrices(structure)]
    _print_table(tables.console_table("Matrices", tables.MATRIX_HEADER[:5], rows))
    _print_table(tables.console_table("Parameters", ["", "before", "after", "removed"], tables.sizes(structure)))
    _show_costs(planned)


def _show_costs(planned: dict[str, Any]) -> None:
    from sparsekd.report import tables

    recipe = planned["recipe"]
    print(f"device        {planned['device']}, {planned['dtype']}")
    if recipe["distill"]["teacher"] == "online":
        print("teacher cache none: distill.teacher is online")
    else:
        print(f"teacher cache {planned['cache_tokens']:,} tokens, before zstd")
        for name, size in planned["cache"].items():
            chosen = "  <- this recipe" if name == recipe["cache"]["codec"] else ""
            total = tables.size(float(size["bytes"]))
            print(f"  {name:<11} {size['bytes_per_token']:>4} bytes a token  {total:>9}{chosen}")
    print(f"peak memory   about {planned['peak_memory_bytes'] / 1e9:.1f} GB")
    for name, seconds in planned["seconds"].items():
        print(f"{name:<13} about {tables.duration(seconds)}")
    print(f"{'total':<13} about {tables.duration(sum(planned['seconds'].values()))}")


def _print_facts(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(facts)
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


def _print_table(table: Any) -> None:
    from rich.console import Console

    plain = Console()
    if not plain.is_terminal:
        plain = Console(width=140)
    plain.print(table)


def _print_json(value: Any) -> None:
    from sparsekd.files import as_json

    print(as_json(value, "the result", indent=1))


def _quiet() -> None:
    """Silences the notes of transformers and of the harness; ours say what is going on."""
    import logging

    from transformers.utils import logging as notes

    notes.set_verbosity_error()
    notes.disable_progress_bar()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def main() -> None:
    """The `sparsekd` command: an error for the user is one line, and its class decides the exit code."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # before transformers is imported: unpacking GGUF has a bar of its own
    try:
        app()
    except SparseKDError as error:
        print(f"sparsekd: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        _say_why(f"{error.strerror or error}: {error.filename or ''}")
        sys.exit(4)
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit:  # typer has answered
        raise
    except BaseException as error:
        if type(error).__name__ == "PanicException":  # of a library written in Rust; it is no Exception
            _say_why(f"a library gave up: {error}")
            sys.exit(3)
        from sparsekd.device import out_of_memory

        if not out_of_memory(error):
            raise
        _say_why("out of memory: smaller batches, a shorter context or another dtype need less")
        sys.exit(4)


def _say_why(message: str) -> None:
    """As an error of ours says it: on one line of bounded length."""
    print(f"sparsekd: {SparseKDError(message)}", file=sys.stderr)
