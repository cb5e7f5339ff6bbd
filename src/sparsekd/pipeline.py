"""The paper's procedure, top to bottom: corpus, then rounds of cache, compress, distill, evaluate; then the report.

`run/rounds.py` says what the rounds are, `run/stages` what each stage does. A finished stage is reused, so a run that
was stopped, or is called again with another `until`, goes on where it was.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sparsekd import bench, compression, corpus, distillation, export, files, models, report
from sparsekd.compression import damage, spectra
from sparsekd.console import Console
from sparsekd.device import exact_products, place
from sparsekd.errors import QualityError, UsageError
from sparsekd.evaluate import harness
from sparsekd.recipe import Recipe, method_named
from sparsekd.records import Record
from sparsekd.run import (
    BENCH,
    CORPUS,
    OF_ROUND,
    STAGES,
    Round,
    Run,
    Summary,
    Work,
    is_run,
    planned,
    read_recipe,
    settings_of,
    stages,
)
from sparsekd.teacher import merge_shares

UNTIL = (*STAGES, "report")


def run(
    recipe: Recipe,
    folder: Path,
    *,
    until: str = "report",
    resume: bool = False,
    fresh: bool = False,
    console: Console | None = None,
) -> dict[str, Summary]:
    """Runs all rounds in `folder` and returns the summary of each stage of the last one by name; an `until` before
    `evaluate` ends within the first round.

    Finished stages are reused. Raises what the stages raise; whatever was finished stays and the next call continues.
    `QualityError` comes last, after the report is written: the last model is worse than before its distillation.
    """
    check_before_starting(recipe)
    rounds = planned(recipe)
    if UNTIL.index(until) < UNTIL.index("evaluate"):
        rounds = rounds[:1]
    with Run.open(folder, recipe, console or Console(), resume=resume, fresh=fresh) as opened:
        work = Work(opened)
        if opened.processes.is_split:
            distillation.require_splittable(recipe.distill)
        opened.keep_recipe(settings_of(recipe, planned(recipe)))
        summaries = {"corpus": opened.processes.main_first(lambda: stages.corpus.make(work))}
        if until != "corpus":
            for round_ in rounds:
                summaries |= run_round(work, round_, until)
        if until == "report" and recipe.bench:
            opened.processes.main_first(lambda: _bench(work, rounds))
        if until == "report" and opened.processes.is_main:
            written = report.write(folder)
            opened.console.say(f"report: {folder / 'report.html'}")
            if recipe.distill.start == "weights":  # else nothing of the compressed model was there to be made worse
                _quality_gate(written)
        return summaries


def run_round(work: Work, round_: Round, until: str = "evaluate") -> dict[str, Summary]:
    """The stages of one round up to `until`, with the summary of each by name. Processes started together share
    teacher, statistics and training; the main one evaluates, the others hold their parts of models that are split."""
    processes, summaries = work.run.processes, {}
    for name, stage in OF_ROUND.items():
        if UNTIL.index(name) <= UNTIL.index(until) and stage.folder(round_) is not None:
            step = functools.partial(stage.make, work, round_)
            summaries[name] = (
                step() if stage.together else work.main_first(step, list(round_.models(work.dense).values()))
            )
            processes.wait()  # what comes next reads what the main process has just written
    return summaries


def _bench(work: Work, rounds: Sequence[Round]) -> Summary:
    """Stage `bench`: perplexity against speed and bytes; measured again where a model or the text has changed."""
    options = work.recipe.evaluate
    name = next(iter(options.texts))
    inputs = {
        "models": {str(one.distilled): work.identity(one.distilled) for one in rounds},
        "dense": work.identity(work.dense),
        "text": files.sha256(work.blocks.texts[name]),
    }
    stage = work.run.stage(BENCH, inputs, replaces=True)
    if stage.summary is not None:
        return stage.summary
    work.release()
    console = work.run.console
    text = work.blocks.texts[name]
    found = bench.frontier(_candidates(work.run.folder), text, stage.folder, say=console.say, warn=console.warn)
    return stage.finish(found | {"text": name})


def frontier(folders: Sequence[Path], text: str | None, console: Console, **options: Any) -> Record:
    """Perplexity against speed and bytes of the dense model and the distilled ones of finished runs, on an evaluation
    text of the first run; `options` as in `bench.frontier`. Raises `UsageError` for runs that do not belong together,
    `DataError` for one that is not finished."""
    for folder in folders:
        if not is_run(folder):
            raise UsageError(f"{folder} is no run: expected the --out of sparsekd run")
        export.locate(str(folder))  # finished
    dense = {read_recipe(folder).model.name: folder for folder in folders}
    if len(dense) > 1:
        raise UsageError(f"the runs have different dense models: {', '.join(dense)}")
    texts = corpus.load(folders[0] / CORPUS).texts
    name = text or next(iter(texts), None)
    if name not in texts:
        raise UsageError(f"--text {name}: {folders[0]} evaluates on {', '.join(texts) or 'no text'}")
    candidates = [one for folder in folders for one in _candidates(folder)]
    candidates = list({one.source.name: one for one in candidates}.values())  # the dense one is all runs'
    with tempfile.TemporaryDirectory() as temporary:
        found = bench.frontier(candidates, texts[name], Path(temporary), say=console.say, warn=console.warn, **options)
    return found | {"text": name}


def _candidates(folder: Path) -> list[bench.Candidate]:
    """The dense model and each round's distilled one, by what it has lost."""
    recipe = read_recipe(folder)
    found = [bench.Candidate("dense", export.Source(recipe.model.name, revision=recipe.model.revision))]
    for one in planned(recipe):
        lost = f"{one.compress.methods} {one.compress.total:.0%}" if one.compress else one.name
        found.append(
            bench.Candidate(f"{folder.name}: {lost}", export.Source(str(folder / one.distilled / "model"), folder))
        )
    return found


def check_before_starting(recipe: Recipe) -> None:
    """Raises `UsageError`, of a teacher of other tokens `MismatchError`, for what would stop the run hours from now."""
    model, options = recipe.model, recipe.evaluate
    trusts = model.trust_remote_code
    skeleton = models.skeleton(model.name, revision=model.revision, trust_remote_code=trusts)
    first = next(one.compress for one in planned(recipe) if one.compress is not None)
    compression.plan_for(skeleton, first)
    if recipe.teacher.models:
        own = models.load_tokenizer(model.name, revision=model.revision, trust_remote_code=trusts)
        for name in recipe.teacher.models:
            models.skeleton(name, trust_remote_code=trusts)
            tokenizer = models.load_tokenizer(name, trust_remote_code=trusts)
            models.require_same_tokenizer(tokenizer, own, name, model.name)
    harness.check(options.tasks, recipe.corpus.root, skip_missing=options.skip_missing_tasks)
    if recipe.bench and not options.texts:
        raise UsageError("bench: true needs a text: give evaluate.texts one")
    if recipe.bench:
        bench.require_format()


def cache_share(recipe: Recipe, folder: Path, share: corpus.Share, console: Console | None = None) -> Summary:
    """What one of several processes does for the first round's cache: any scheduler may start them, in any order.

    They share the run directory, whose corpus must be finished; `merge_cache` then makes the stage whole.
    """
    if not (folder / CORPUS / "stage.json").exists():
        raise UsageError(f"{folder} has no finished corpus: run sparsekd corpus with this recipe and --out first")
    with Run.open(folder, recipe, console or Console(), resume=True, shared=True) as opened:
        work = Work(opened)
        stages.corpus.make(work)
        return stages.cache.make(work, planned(recipe)[0], share)


def merge_cache(recipe: Recipe, folder: Path, console: Console | None = None) -> Summary:
    """Finishes the first round's cache from what all shares have written; raises `DataError` naming a missing one."""
    with Run.open(folder, recipe, console or Console(), resume=True) as opened:
        work = Work(opened)
        stages.corpus.make(work)
        stage = stages.cache.stage_of(work, planned(recipe)[0])
        merged = merge_shares(stage.folder, range(len(work.blocks.blocks)))
        return stage.finish(stages.cache.summary_of(merged, work.blocks))


def spectrum(recipe: Recipe) -> Record:
    """The spectra of a model's MLP matrices on the recipe's corpus or, by method `neurons`, what each width of each MLP
    is predicted to cost; keeps nothing."""
    if recipe.compress.first:
        raise UsageError("spectrum shows what one method sees: expected one step in compress, found several")
    options, section, placement = recipe.model, recipe.compress, place(recipe.device, recipe.model.dtype)
    model, tokenizer = models.load(
        options.name,
        revision=options.revision,
        dtype=torch.float32,  # as the structural step itself is solved
        device=placement.device,
        trust_remote_code=options.trust_remote_code,
    )
    batches, separator = [], None
    if method_named(section.method).needs(section.options).passes:
        blocks = corpus.build(recipe.corpus, recipe.evaluate.texts, tokenizer, recipe.seed)
        batches, separator = stages.compress.calibration_batches(blocks, section, recipe.seed), blocks.separator
    calibration = compression.Calibration(model, batches, seed=recipe.seed, separator=separator, warn=Console().warn)
    with exact_products(options.dtype == "float32"):
        if section.method == "neurons":
            return damage.as_dict(compression.damage_of(model, calibration, section), section)
        return spectra.as_dict(compression.spectra_of(model, calibration, section), section)


def _quality_gate(written: Record) -> None:
    evaluated = written["evaluation"]["models"]
    worse = [
        text
        for text, result in evaluated["distilled"].items()
        if result["perplexity"] > evaluated["compressed"][text]["perplexity"]
    ]
    if worse and len(worse) == len(evaluated["distilled"]):
        raise QualityError(f"distillation made the model worse on {', '.join(worse)}: lower distill.learning_rate")
