"""Stage `evaluate`: the dense model and the round's own to what the texts, and the tasks, say about them, and to what
they say themselves.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsekd import corpus, files
from sparsekd.evaluate import continuations, harness, measure, prefill
from sparsekd.recipe import inputs_of
from sparsekd.records import Record
from sparsekd.run.reading import Summary
from sparsekd.run.rounds import Place, Round, folder_of
from sparsekd.run.stage import Stage
from sparsekd.run.work import Loaded, Work


def make(work: Work, round_: Round) -> Summary:
    """The dense model and the round's own on the texts, on the tasks and on the prompts that the recipe names."""
    found = measure_texts(work, round_)
    return found | {"continuations": continue_prompts(work, round_), "tasks": score_tasks(work, round_)}


def score_tasks(work: Work, round_: Round) -> dict[str, Record]:
    """The scores of the dense model and the round's own, by name; none without tasks in the recipe."""
    named = round_.models(work.dense) if work.recipe.evaluate.tasks else {}
    return {name: score_model(work, where) for name, where in named.items()}


def continue_prompts(work: Work, round_: Round) -> dict[str, list[Record]]:
    """What the dense model and the round's own say, by name; none without prompts in the recipe."""
    named = round_.models(work.dense) if work.recipe.evaluate.prompts else {}
    return {name: continue_model(work, where) for name, where in named.items()}


def measure_texts(work: Work, round_: Round) -> Summary:
    """Stage `evaluate`: the dense model and the round's own on every text; what is there already is not measured
    again, and with other texts or settings all of it is."""
    options = work.recipe.evaluate
    named = round_.models(work.dense)
    apart = {"texts", "tasks", "task_limit", "prompts"}  # compared by their content, or stages of their own
    inputs = {
        "models": {name: work.identity(where) for name, where in named.items()},
        "dtype": work.dtype,
        "corpus": work.blocks.fingerprint,
        "texts": {name: files.sha256(work.blocks.texts[name]) for name in options.texts},
        "evaluate": {key: value for key, value in inputs_of(options).items() if key not in apart},
    }
    stage = work.run.stage(str(round_.evaluation), inputs, replaces=True)
    if stage.summary is not None:
        return stage.summary
    # side by side only where they are compared with the dense model, which reads a text once for all of them: memory
    together = [tuple(named)] if options.agreement else [(name,) for name in named]
    speed: Record | None = None
    for names in together:
        compared = _Compared(work, {name: named[name] for name in names})
        for text in options.texts:
            _measure(compared, text, work.blocks.texts[text], stage)
        if options.agreement and options.texts and names == together[-1]:  # the model that the run is for
            speed = prefill({name: compared.models[name] for name in ("dense", names[-1])})
    results = {name: {text: stage.kept(_result(name, text)) for text in options.texts} for name in named}
    return stage.finish({"models": results, "prefill": speed})


def score_model(work: Work, where: Place) -> Record:
    """Stage `tasks`: a model's scores on the recipe's tasks. The dense model's serve all rounds. A task that was
    skipped is tried again: a local one when its file is there, of which the inputs tell."""
    options, root, console = work.recipe.evaluate, work.recipe.corpus.root, work.run.console
    inputs = {
        "model": work.identity(where),
        "dtype": work.dtype,
        "tasks": options.tasks,
        "limit": options.task_limit,
        "files": {name: files.file_sha256(path) for name, path in harness.local_files(options.tasks, root).items()},
    }
    stage = work.run.stage(str(folder_of(where, "tasks")), inputs, replaces=True)
    known, missing = {}, options.tasks
    if stage.summary is not None:
        known = stage.summary["scores"]
        missing = [name for name, score in known.items() if score["skipped"] and not harness.is_local(name)]
    if not missing or (known and not work.run.processes.is_main):
        return known
    model, tokenizer = work.open(where)
    with work.placement.products():
        found = harness.run_tasks(
            model,
            tokenizer,
            missing,
            root=root,
            limit=options.task_limit,
            skip_missing=options.skip_missing_tasks,
            batch_size=options.batch_size,
        )
    for result in found.values():
        if result.skipped is not None:
            console.say(f"  skipped: {result.skipped}")
    return stage.finish({"scores": known | {task: result.as_dict() for task, result in found.items()}})["scores"]


def continue_model(work: Work, where: Place) -> list[Record]:
    """Stage `continuations`: how a model goes on from the recipe's prompts. The dense model's serve all rounds."""
    prompts, console = work.recipe.evaluate.prompts, work.run.console
    inputs = {
        "model": work.identity(where),
        "dtype": work.dtype,
        "prompts": {str(number): repr(prompt) for number, prompt in enumerate(prompts, 1)},  # a difference is one line
        "num_tokens": continuations.NUM_TOKENS,
    }
    stage = work.run.stage(str(folder_of(where, "continuations")), inputs, replaces=True)
    if stage.summary is not None:
        return stage.summary["continuations"]
    model, tokenizer = work.open(where)
    with console.bar("going on from the prompts", len(prompts) * continuations.NUM_TOKENS) as bar:
        said = continuations.generate(model, tokenizer, prompts, on_tokens=bar.advance, say=console.say)
    return stage.finish({"continuations": said})["continuations"]


class _Compared:
    """Models to measure_texts side by side, and what is worked out from them, on first use."""

    def __init__(self, work: Work, places: dict[str, Place]):
        self.work, self.names, self._places = work, tuple(places), places

    @functools.cached_property
    def models(self) -> dict[str, PreTrainedModel]:
        return {name: model for name, (model, _) in self._opened.items()}

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._opened[self.names[0]][1]

    @functools.cached_property
    def token_counts(self) -> torch.Tensor:
        """How often each token occurs in the distinct training blocks."""
        blocks = self.work.blocks
        learned = np.concatenate(blocks.tokens(np.unique(blocks.train_ids).tolist()))
        vocab_size = self.models[self.names[0]].config.get_text_config().vocab_size
        return torch.from_numpy(np.bincount(learned, minlength=vocab_size))

    @functools.cached_property
    def _opened(self) -> dict[str, Loaded]:
        return {name: self.work.open(where) for name, where in self._places.items()}


def _measure(compared: _Compared, text: str, content: str, stage: Stage) -> None:
    """Keeps for each of the models what the text says about it."""
    options = compared.work.recipe.evaluate
    missing = [name for name in compared.names if stage.kept(_result(name, text)) is None]
    if not missing:
        return
    bound = options.max_tokens or len(corpus.encode(compared.tokenizer, content))
    passes = len(compared.names) * options.context / options.stride
    title = f"evaluating {' and '.join(compared.names)} on {text}"
    work = compared.work
    with work.run.console.bar(title, round(bound * passes)) as bar, work.placement.products():
        found = measure(
            compared.models,
            compared.tokenizer,
            content,
            teacher="dense" if options.agreement else None,
            token_counts=compared.token_counts if options.agreement else None,
            context=options.context,
            stride=options.stride,
            max_tokens=options.max_tokens,
            batch_size=options.batch_size,
            on_tokens=bar.advance,
            say=work.run.console.say,
        )
    for name in missing:  # those that are kept already were measured again beside them
        stage.keep(_result(name, text), found[name].as_dict())


def _result(name: str, text: str) -> str:
    return f"{name}-text-{text}.json"
