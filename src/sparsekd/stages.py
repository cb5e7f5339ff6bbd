"""The stages of a round, each a function of the run's work and the round; each reuses its own finished output.

Models are opened only when a stage needs them, and the dense one is kept from stage to stage.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsekd import cache as caches
from sparsekd import compression, corpus, distillation, files, models, records, sources, teacher
from sparsekd.cache import WHOLE, Cache, Part, Targets
from sparsekd.corpus import Corpus
from sparsekd.errors import MismatchError
from sparsekd.evaluate import harness, measure
from sparsekd.objective import Teacher, require_document_mask
from sparsekd.recipe import Compress, Recipe, inputs_of
from sparsekd.rounds import CORPUS, Place, Round, planned, tasks_folder
from sparsekd.run import Run, Stage, read_inputs, read_summary, stop_signals
from sparsekd.teacher import TeacherModel
from sparsekd.tokens import encode

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


class Work:
    """An open run, its corpus, and its models by place: what each is made of at once, its weights on first use."""

    def __init__(self, run: Run):
        self.run = run
        self.recipe = run.recipe
        self.placement = run.placement
        self._dense: Loaded | None = None
        self._identities: dict[str, dict[str, Any]] = {}

    @functools.cached_property
    def blocks(self) -> Corpus:
        """The finished corpus; `make_corpus` makes it."""
        return corpus.load(self.run.folder / CORPUS)

    @property
    def dense(self) -> str:
        return self.recipe.model.name

    def identity(self, where: Place) -> dict[str, Any]:
        """What decides the weights of the model at `where`: its content, or what its stage was made from."""
        if isinstance(where, Path):
            return {"folder": str(where), "made_from": files.fingerprint(read_inputs(self.run.folder / where))}
        if where not in self._identities:  # hashing a model takes seconds
            commit = self.commit(where)
            found = {"content": models.source_hash(where)} if commit is None else {"name": where, "commit": commit}
            self._identities[where] = found
        return self._identities[where]

    def commit(self, where: Place) -> str | None:
        """The commit of the Hub model at `where`, the same for the whole run; None for local models."""
        if isinstance(where, Path):
            return None
        return self.run.commit(where, self.recipe.model.revision if where == self.dense else None)

    @property
    def dtype(self) -> str:
        """The number format of the teacher's pass and of evaluation, for the inputs of a stage."""
        return str(self.placement.dtype).removeprefix("torch.")

    def open(self, where: Place) -> Loaded:
        """The model at `where`, to read; the dense one stays in memory until it is released or taken."""
        if where != self.dense:
            return self._load(where, self.placement.dtype)
        if self._dense is None:
            self._dense = self._load(where, self.placement.dtype)
        return self._dense

    def take(self, where: Place, dtype: torch.dtype) -> Loaded:
        """The model at `where`, to change: one of its own, for whoever opened it before may read it still."""
        if where == self.dense:
            self.release()
        return self._load(where, dtype)

    def release(self) -> None:
        """Room for other models."""
        self._dense = None

    def _load(self, where: Place, dtype: torch.dtype) -> Loaded:
        name = str(self.run.folder / where / "model") if isinstance(where, Path) else where
        self.run.console.say(f"loading {where} ({self.placement.device}, {self.placement.reason})")
        return models.load(
            name,
            revision=self.commit(where),
            dtype=dtype,
            device=self.placement.device,
            trust_remote_code=self.recipe.model.trust_remote_code,
        )

    def save(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stage: Stage) -> None:
        """Writes `model` in the stage's folder, in the number format that the dense checkpoint has, so that sizes
        compare."""
        if self.run.processes.is_main:
            dtype = models.checkpoint_dtype(self.dense, self.commit(self.dense))
            models.save(model, tokenizer, stage.folder / "model", dtype=dtype)


# ---- what the recipe says of each stage


def settings_of(recipe: Recipe, rounds: Iterable[Round]) -> dict[str, dict[str, Any]]:
    """The settings of all stages of `rounds`, by their folders."""
    return {folder: values for round_ in rounds for folder, values in settings(recipe, round_).items()}


def settings(recipe: Recipe, round_: Round) -> dict[str, dict[str, Any]]:
    """What the recipe alone decides of the inputs of a round's stages, by their folders; evaluations follow it."""
    drawn = {"seed": round_.seed, "share": str(round_.share)}
    cached = {"teacher": "online", "top_k": recipe.cache.top_k}
    if recipe.distill.teacher == "cache":
        cached = {"cache": inputs_of(recipe.cache)}
    of_corpus = inputs_of(recipe.corpus) | {"order": list(recipe.corpus.sources)}
    found = {CORPUS: {"corpus": of_corpus, "seed": recipe.seed}, round_.cache: cached}
    if round_.compress is not None:
        found[str(round_.compressed)] = {"compress": inputs_of(round_.compress)} | drawn
    return found | {str(round_.distilled): {"distill": inputs_of(round_.distill)} | drawn}


# ---- corpus


def make_corpus(work: Work) -> dict[str, Any]:
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
    if recipe.corpus.document_mask:  # here, and not after hours of work for a model that cannot do it
        require_document_mask(model)
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
    recipe, seen = (
        work.recipe,
        records.read(folder / corpus.GUARDED, way_out=f"remove {folder} to make the corpus again"),
    )
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


def _guarded(work: Work, tasks: Iterable[str]) -> dict[str, Any]:
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


# ---- cache


def fill_cache(work: Work, round_: Round, part: Part = WHOLE) -> dict[str, Any]:
    """Stage `cache`: the teacher's distributions of all training and validation blocks, or one `part` of them."""
    options, blocks, processes = work.recipe.cache, work.blocks, work.run.processes
    stage = cache_stage(work, round_)
    if work.recipe.distill.teacher == "online":  # an empty stage, so that later ones find its inputs
        return stage.summary or stage.finish({"blocks": 0, "tokens": 0, "top_k": options.top_k, "bytes": 0})
    if stage.summary is not None and caches.is_complete(stage.folder):  # else a shard was removed: it is made again
        return stage.summary
    together = processes.count > 1
    if together:
        part = Part(processes.rank + 1, processes.count)
        processes.main_first(lambda: caches.forget_parts(stage.folder))
    by_id = {block_id: block.tokens for block_id, block in enumerate(blocks.blocks)}
    num_tokens = sum(len(tokens) for tokens in by_id.values()) // part.count
    model, tokenizer, vocab_size = _open_teacher(work, round_)
    with work.run.console.bar("caching", num_tokens) as bar:
        cache = teacher.fill(
            model,
            stage.folder,
            by_id,
            tokenizer=tokenizer,
            corpus_fingerprint=blocks.fingerprint,
            codec=options.codec,
            top_k=options.top_k,
            vocab_size=vocab_size,
            seed=work.recipe.seed,
            blocks_per_shard=options.blocks_per_shard,
            batch_size=options.batch_size,
            part=part,
            separator=blocks.separator,
            on_tokens=lambda count: bar.advance(count, f"{num_tokens} tokens"),
            say=work.run.console.say,
        )
    if together:
        processes.wait()
        cache = processes.main_first(lambda: caches.merge(stage.folder, by_id))
    return {"part": str(part)} if cache is None else stage.finish(cache_summary(cache, blocks))


def cache_stage(work: Work, round_: Round) -> Stage:
    """The round's stage `cache` and what it is made from: who teaches, and unless it answers online what is cached."""
    taught_by = [work.identity(where) | {"weight": weight} for where, weight in round_.teachers.items()]
    asked = settings(work.recipe, round_)[round_.cache]
    return work.run.stage(
        round_.cache, {"teachers": taught_by, "dtype": work.dtype, "corpus": work.blocks.fingerprint} | asked
    )


def cache_summary(cache: Cache, blocks: Corpus) -> dict[str, Any]:
    """What a finished cache comes to: sizes, and the identity that whoever opens it insists on."""
    num_tokens = sum(len(block.tokens) for block in blocks.blocks)
    facts = {"blocks": len(blocks.blocks), "tokens": num_tokens, "top_k": cache.top_k, "bytes": cache.num_bytes}
    return facts | {"identity": cache.identity}


def _open_teacher(work: Work, round_: Round) -> tuple[TeacherModel, str, int]:
    """The teacher as one model, mixed where there are several; the hash of its tokenizer; the tokens all know."""
    opened = {where: work.open(where) for where in round_.teachers}
    hashes = {where: models.tokenizer_hash(tokenizer) for where, (_, tokenizer) in opened.items()}
    for where, found in hashes.items():  # the run's own models have the dense one's
        if isinstance(where, str) and found != models.tokenizer_hash(work.open(work.dense)[1]):
            raise MismatchError(
                f"teacher {where}: its tokenizer is not that of {work.dense}, whose tokens it is to predict"
            )
    tokenizer_hash = next(iter(hashes.values()))
    vocab_size = min(models.real_vocab_size(model, tokenizer) for model, tokenizer in opened.values())
    if len(opened) == 1:
        return next(iter(opened.values()))[0], tokenizer_hash, vocab_size
    mixed = teacher.Mixture([model for model, _ in opened.values()], list(round_.teachers.values()))
    return mixed, tokenizer_hash, vocab_size


def _open_cache(work: Work, round_: Round, needed: Iterable[int]) -> Cache:
    """The finished cache of this round and no other, if it covers the blocks that are `needed`."""
    folder = work.run.folder / round_.cache
    summary = read_summary(folder, ("identity",))
    assert summary is not None, "it was made before"
    cache = Cache(folder, summary["identity"])
    cache.require(needed)
    return cache


# ---- compress


def truncate(work: Work, round_: Round) -> dict[str, Any]:
    """Stage `compress`: the round's start with low-rank or masked MLPs, in `compressed/model`."""
    options = round_.compress
    assert options is not None
    inputs = settings(work.recipe, round_)[str(round_.compressed)] | {
        "model": work.identity(round_.start),
        "corpus": work.blocks.fingerprint,
        "ranks": files.file_sha256(Path(options.ranks_from)) if options.ranks_from else None,
        "probed": read_inputs(work.run.folder / round_.cache) if options.probe_tokens else None,
    }
    stage = work.run.stage(str(round_.compressed), inputs)
    if stage.summary is not None:
        return stage.summary
    student, tokenizer = work.take(round_.start, torch.float32)  # what is solved from rounded weights is rounded twice
    batches = statistics_batches(work.blocks, options, round_.seed, round_.share)
    # the probe asks what a cut does to the model as it is: its own distributions, cached if it is its own teacher
    has_top_k = work.recipe.distill.teacher == "cache" and work.recipe.cache.codec != "sampled"
    is_cached = has_top_k and list(round_.teachers) == [round_.start]
    if options.offload:
        torch.nn.Module.to(student, "cpu")
    plan = compression.truncate(
        student,
        batches,
        options,
        seed=round_.seed,
        teacher=_cached(work, round_) if options.probe_tokens and is_cached else None,
        device=work.placement.device,
        separator=work.blocks.separator,
        warn=work.run.console.warn,
    )
    work.save(student, tokenizer, stage)
    share = f"{plan.mlp_reduction:.1%} of the MLP parameters"
    removed = f"removed {share}, {plan.model_reduction:.1%} of the whole model"
    work.run.console.say(f"  set {share} to zero" if options.format == "mask" else f"  {removed}")
    return stage.finish(plan.as_dict())


def _cached(work: Work, round_: Round) -> Callable[[torch.Tensor], Targets]:
    """The cached distributions of a block by its tokens."""
    blocks = work.blocks
    cache = _open_cache(work, round_, blocks.train_ids.tolist())
    ids = {block.tokens.tobytes(): block_id for block_id, block in enumerate(blocks.blocks)}

    def read(tokens: torch.Tensor) -> Targets:
        block = tokens.numpy().astype(np.int32)
        targets = cache.read(ids[block.tobytes()], block)
        assert isinstance(targets, Targets)
        return targets

    return read


def statistics_batches(
    blocks: Corpus, options: Compress, seed: int, share: corpus.Share = corpus.ALL
) -> list[torch.Tensor]:
    """Batches of equally long training blocks of the share, in the first epoch's order, enough for statistics and
    probe."""
    batches, batch, total = [], [], 0
    for block_id in blocks.order(seed, 0, share):
        tokens = blocks.blocks[block_id].tokens
        if batch and (len(batch) == options.batch_size or len(tokens) != len(batch[0])):
            batches.append(batch)
            batch = []
        batch.append(tokens)
        total += len(tokens)
        if total >= options.num_tokens + options.probe_tokens:
            break
    return [torch.from_numpy(np.stack(batch).astype(np.int64)) for batch in [*batches, batch]]


# ---- distill


def train(work: Work, round_: Round) -> dict[str, Any]:
    """Stage `distill`: the round's student trained to match its teacher, in `distilled/model`."""
    blocks, run = work.blocks, work.run
    stage = run.stage(str(round_.distilled), training_inputs(work, round_))
    if stage.summary is not None:
        return stage.summary
    data = training_data(work, round_, functools.partial(blocks.order, round_.seed, share=round_.share))
    dense_ce = distillation.measure(work.open(work.dense)[0], data, round_.distill).ce
    work.release()  # room for the student; the evaluation reads it again
    student, tokenizer = work.take(round_.student, torch.float32)
    num_tokens = sum(len(tokens) for tokens in blocks.tokens(data.order(0).tolist())) * round_.distill.epochs
    with run.console.bar("training", num_tokens) as bar, stop_signals() as received:
        trained = 0

        def on_step(step: distillation.Step, num_steps: int) -> None:
            nonlocal trained
            speed = (step.num_tokens - trained) / max(step.seconds, 1e-9) if trained else 0.0
            note = f"step {step.step}/{num_steps}  loss {step.loss:.3f}  " + (f"{speed:.0f} tokens/s" if speed else "")
            bar.advance(step.num_tokens - trained, note)
            trained = step.num_tokens

        history = distillation.train(
            student,
            data,
            round_.distill,
            folder=stage.folder,
            dense_ce=dense_ce,
            on_step=on_step,
            on_validation=lambda v: run.console.say(
                f"  validation after step {v.step}: loss {v.loss:.3f}, KD {v.kd:.3f}, cross-entropy {v.ce:.3f}, "
                f"agreement {v.agreement:.1%}"
            ),
            say=run.console.say,
            stop_signal=lambda: received[0] if received else None,
        )
    run.console.say(f"  {history.stop_reason}; weights after step {history.best_step} kept")
    work.save(student, tokenizer, stage)
    if run.processes.is_main:
        files.remove(stage.folder / "checkpoints")
    return stage.finish(history.as_dict())


def training_inputs(work: Work, round_: Round) -> dict[str, Any]:
    """What a round's training is made from."""
    return settings(work.recipe, round_)[str(round_.distilled)] | {
        "start": work.identity(round_.student),
        "teacher": read_inputs(work.run.folder / round_.cache),
    }


def training_data(work: Work, round_: Round, order: Callable[[int], np.ndarray]) -> distillation.Data:
    """What a round trains on, in the order that is given, and who teaches it."""
    blocks = work.blocks
    return distillation.Data(
        [block.tokens for block in blocks.blocks],
        order,
        blocks.validation_ids.tolist(),
        _teacher(work, round_),
        [block.source for block in blocks.blocks],
        blocks.separator,
    )


def _teacher(work: Work, round_: Round) -> Teacher:
    blocks = work.blocks
    if work.recipe.distill.teacher == "cache":
        return _open_cache(work, round_, {*blocks.train_ids.tolist(), *blocks.validation_ids.tolist()})
    model, _, vocab_size = _open_teacher(work, round_)
    return teacher.Online(model, work.recipe.cache.top_k, vocab_size, blocks.separator)


# ---- evaluate


def evaluate(work: Work, round_: Round) -> dict[str, Any]:
    """Stage `evaluate`: the dense model and the round's own on every text; what is there already is not measured
    again, and with other texts or settings all of it is."""
    options = work.recipe.evaluate
    named = round_.models(work.dense)
    about_tasks = {"texts", "tasks", "task_limit"}
    inputs = {
        "models": {name: work.identity(where) for name, where in named.items()},
        "dtype": work.dtype,
        "corpus": work.blocks.fingerprint,
        "texts": {name: files.sha256(work.blocks.texts[name]) for name in options.texts},
        "evaluate": {key: value for key, value in inputs_of(options).items() if key not in about_tasks},
    }
    stage = work.run.stage(str(round_.evaluation), inputs, replaces=True)
    if stage.summary is not None:
        return stage.summary
    # side by side with the dense model only where they are compared, and one of them at a time: memory
    together = [("dense", name) for name in named if name != "dense"] if options.agreement else [(n,) for n in named]
    for names in together:
        compared = _Compared(work, {name: named[name] for name in names})
        for text in options.texts:
            _measure(compared, text, work.blocks.texts[text], stage)
    results = {name: {text: stage.kept(_result(name, text)) for text in options.texts} for name in named}
    return stage.finish({"models": results})


def score_tasks(work: Work, where: Place) -> dict[str, Any]:
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
    stage = work.run.stage(str(tasks_folder(where)), inputs, replaces=True)
    known, missing = {}, options.tasks
    if stage.summary is not None:
        known = stage.summary["scores"]
        missing = [name for name, score in known.items() if score["skipped"] and not harness.is_local(name)]
    if not missing or (known and not work.run.processes.is_main):
        return known
    model, tokenizer = work.open(where)
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


class _Compared:
    """Models to evaluate side by side, and what is worked out from them, on first use."""

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
    bound = options.max_tokens or len(encode(compared.tokenizer, content))
    passes = len(compared.names) * options.context / options.stride
    title = f"evaluating {' and '.join(compared.names)} on {text}"
    with compared.work.run.console.bar(title, round(bound * passes)) as bar:
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
            say=compared.work.run.console.say,
        )
    for name in missing:  # the dense model is measured again beside every other
        stage.keep(_result(name, text), found[name].as_dict())


def _result(name: str, text: str) -> str:
    return f"{name}-text-{text}.json"
