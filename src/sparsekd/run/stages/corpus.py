"""Stage `corpus`: sources to token blocks, and the texts to evaluate on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from sparsekd import corpus, files, records
from sparsekd.corpus import sources
from sparsekd.distillation import require_document_mask
from sparsekd.evaluate import continuations, harness
from sparsekd.recipe import inputs_of
from sparsekd.records import Record
from sparsekd.run.reading import Summary
from sparsekd.run.rounds import CORPUS, Round, planned
from sparsekd.run.settings import settings
from sparsekd.run.work import Work


def make(work: Work, round_: Round | None = None) -> Summary:
    """Stage `corpus`: the token blocks, built unless they are there, the texts to evaluate on, and the stage's summary.

    The texts may change later. Raises `DataError` for text of an evaluation in the blocks, whenever it was added.
    """
    recipe, run = work.recipe, work.run
    paths = {name: source.path for name, source in recipe.corpus.sources.items() if source.path is not None}
    inputs = settings(recipe, planned(recipe)[0])[CORPUS] | {
        "model": work.identity(work.dense),
        "files": {name: files.file_sha256(sources.resolve(path, recipe.corpus.root)) for name, path in paths.items()},
    }
    stage = run.stage(CORPUS, inputs)
    if stage.summary is not None:
        _add_texts(work, stage.folder)
        return stage.summary
    model, tokenizer = work.open(work.dense)
    # here, and not after hours of work for a model that cannot do it
    if recipe.corpus.document_mask:
        require_document_mask(model)
    continuations.prompt_ids(model, tokenizer, recipe.evaluate.prompts)
    tasks = _texts_of_tasks(work, recipe.evaluate.tasks)
    built = corpus.build(recipe.corpus, recipe.evaluate.texts, tokenizer, recipe.seed, tasks)
    corpus.save(built, stage.folder)
    records.write(stage.folder / corpus.GUARDED, _guarded(work, tasks))
    for name, source in built.reports.items():
        if source.dropped_documents:
            run.console.say(
                f"  leak guard: {name}: {source.dropped_documents} of {source.documents} documents dropped, "
                f"{source.leaked_sequences} sequences of {corpus.GUARD_WORDS} words are in an evaluation text"
            )
        if source.drawn > source.blocks:
            run.console.say(f"  {name}: {source.blocks} blocks repeat to fill its share of {source.drawn}")
    summary = {
        "fingerprint": built.fingerprint,
        "blocks": len(built.train_ids),
        "distinct_blocks": len(built.blocks) - len(built.validation_ids),
        "validation_blocks": len(built.validation_ids),
        "tokens": built.num_tokens,
        "sources": {name: vars(source) for name, source in built.reports.items()},
    }
    return stage.finish(summary)


def _add_texts(work: Work, folder: Path) -> None:
    """Takes in what the recipe evaluates on now and did not when the leak guard last looked, if the blocks have none
    of it."""
    recipe = work.recipe
    seen = records.read(folder / corpus.GUARDED, way_out=f"remove {folder} to make the corpus again")
    changed = [name for name, made_from in _guarded(work, recipe.evaluate.tasks).items() if seen.get(name) != made_from]
    if not changed:
        return
    texts = {name: text for name, text in recipe.evaluate.texts.items() if corpus.text_key(name) in changed}
    tasks = _texts_of_tasks(work, [name for name in recipe.evaluate.tasks if corpus.task_key(name) in changed])
    found = {name: corpus.read_text(text, recipe.corpus) for name, text in texts.items()}
    if not found and not tasks:  # a task that is missing still
        return
    corpus.add_texts(folder, recipe.corpus, found, tasks)
    records.write(folder / corpus.GUARDED, seen | _guarded(work, tasks))


def _texts_of_tasks(work: Work, names: Sequence[str]) -> dict[str, str]:
    """What each task, or group of tasks, asks; without those that are missing here and may be."""
    root, skip_missing = work.recipe.corpus.root, work.recipe.evaluate.skip_missing_tasks
    found = {name: "\n".join(harness.texts([name], root, skip_missing=skip_missing).values()) for name in names}
    return {name: text for name, text in found.items() if text}


def _guarded(work: Work, tasks: Iterable[str]) -> Record:
    """What decides the content of each evaluation text and of these tasks, by their places in the recipe."""
    recipe, root = work.recipe, work.recipe.corpus.root
    local = harness.local_files(list(tasks), root)
    of_texts = {
        corpus.text_key(name): inputs_of(text)
        | {"sha256": files.file_sha256(sources.resolve(text.path, root)) if text.path else None}
        for name, text in recipe.evaluate.texts.items()
    }
    of_tasks = {
        corpus.task_key(name): {"sha256": files.file_sha256(local[name]) if name in local else None} for name in tasks
    }
    return of_texts | of_tasks
