"""The stages of a round, each a function of the run's work and the round; each reuses its own finished output.

Models are opened only when a stage needs them, and the dense one is kept from stage to stage.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsekd import cache as caches
from sparsekd import compression, corpus, distillation, files, models, sources, teacher
from sparsekd.cache import WHOLE, Cache, Part, Targets
from sparsekd.corpus import Corpus
from sparsekd.errors import MismatchError
from sparsekd.evaluate import harness, measure
from sparsekd.objective import Teacher
from sparsekd.recipe import Compress, as_dict
from sparsekd.rounds import CORPUS, Place, Round, tasks_folder
from sparsekd.run import Run, Stage, stop_signals
from sparsekd.teacher import TeacherModel

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


class Work:
    """An open run, its corpus, and its models by place: what each is made of at once, its weights on first use."""

    def __init__(self, run: Run):
        self.run = run
        self.recipe = run.recipe
        self.placement = run.placement
        self._dense: Loaded | None = None

    @functools.cached_property
    def blocks(self) -> Corpus:
        """The finished corpus; `make_corpus` makes it."""
        return corpus.load(self.run.folder / CORPUS)

    @property
    def dense(self) -> str:
        return self.recipe.model.name

    @functools.cached_property
    def dense_identity(self) -> dict[str, Any]:
        return self._named(self.dense, self.recipe.model.revision)

    def identity(self, where: Place) -> dict[str, Any]:
        """What decides the weights of the model at `where`: a name and content, or what its stage was made from."""
        if isinstance(where, Path):
            made_from = files.file_sha256(self.run.folder / where / "inputs.json")
            return {"folder": str(where), "made_from": made_from}
        return self.dense_identity if where == self.dense else self._named(where, None)

    def _named(self, name: str, revision: str | None) -> dict[str, Any]:
        dtype = str(self.placement.dtype).removeprefix("torch.")
        return {"name": name, "revision": revision, "content": models.source_hash(name), "dtype": dtype}

    def open(self, where: Place) -> Loaded:
        """The model at `where`, to read; the dense one stays in memory until it is released or taken."""
        if where != self.dense:
            return self._load(where, self.placement.dtype)
        if self._dense is None:
            self._dense = self._load(where, self.placement.dtype)
        return self._dense

    def take(self, where: Place, dtype: torch.dtype | None = None) -> Loaded:
        """The model at `where`, to change; the dense one is read again by whoever opens it next."""
        dtype = dtype or self.placement.dtype
        if where == self.dense and dtype == self.placement.dtype:
            taken = self.open(where)
            self.release()
            return taken
        return self._load(where, dtype)

    def release(self) -> None:
        """Room for other models."""
        self._dense = None

    def _load(self, where: Place, dtype: torch.dtype) -> Loaded:
        name = str(self.run.folder / where / "model") if isinstance(where, Path) else where
        self.run.console.say(f"loading {where} ({self.placement.device}, {self.placement.reason})")
        return models.load(
            name,
            revision=self.recipe.model.revision if where == self.dense else None,
            dtype=dtype,
            device=self.placement.device,
            trust_remote_code=self.recipe.model.trust_remote_code,
        )

    def save(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stage: Stage) -> None:
        """Writes `model` in the stage's folder, in the number format that the dense checkpoint has, so that sizes
        compare."""
        if self.run.processes.is_main:
            dtype = models.checkpoint_dtype(self.dense, self.recipe.model.revision)
            models.save(model, tokenizer, stage.folder / "model", dtype=dtype)


# ---- corpus


def make_corpus(work: Work) -> dict[str, Any]:
    """Stage `corpus`: the token blocks, built unless they are there, and the stage's summary."""
    recipe, run = work.recipe, work.run
    places = [*recipe.corpus.sources.values(), *recipe.evaluate.texts.values()]
    paths = sorted({place.path for place in places if place.path is not None})
    inputs = {
        "model": work.dense_identity,
        "corpus": as_dict(recipe.corpus),
        "texts": {name: as_dict(text) for name, text in recipe.evaluate.texts.items()},
        "files": {path: files.file_sha256(sources.resolve(path, recipe.corpus.root)) for path in paths},
        "seed": recipe.seed,
    }
    stage = run.stage(CORPUS, inputs)
    if stage.summary is not None:
        return stage.summary
    built = corpus.build(recipe.corpus, recipe.evaluate.texts, work.open(work.dense)[1], recipe.seed)
    corpus.save(built, stage.folder)
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
        )
    if together:
        processes.wait()
        cache = processes.main_first(lambda: caches.merge(stage.folder, by_id))
    return {"part": str(part)} if cache is None else stage.finish(cache_summary(cache, blocks))


def cache_stage(work: Work, round_: Round) -> Stage:
    """The round's stage `cache` and what it is made from: who teaches, and unless it answers online what is cached."""
    if round_.teachers == {work.dense: 1.0}:
        taught_by: dict[str, Any] = {"model": work.dense_identity}
    else:
        weighted = [work.identity(where) | {"weight": weight} for where, weight in round_.teachers.items()]
        taught_by = {"teachers": weighted}
    if work.recipe.distill.teacher == "online":
        return work.run.stage(round_.cache, taught_by | {"teacher": "online"})
    return work.run.stage(
        round_.cache, taught_by | {"corpus": work.blocks.fingerprint, "cache": as_dict(work.recipe.cache)}
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
    cache = Cache(folder, files.read_json(folder / "stage.json")["identity"])
    cache.require(needed)
    return cache


# ---- compress


def truncate(work: Work, round_: Round) -> dict[str, Any]:
    """Stage `compress`: the round's start with low-rank or masked MLPs, in `compressed/model`."""
    options = round_.compress
    assert options is not None
    inputs = {
        "model": work.identity(round_.start),
        "corpus": work.blocks.fingerprint,
        "compress": as_dict(options),
        "seed": round_.seed,
        "ranks": files.file_sha256(Path(options.ranks_from)) if options.ranks_from else None,
        "probed": files.read_json(work.run.folder / round_.cache / "inputs.json") if options.probe_tokens else None,
        **_share(round_),
    }
    stage = work.run.stage(str(round_.compressed), inputs)
    if stage.summary is not None:
        return stage.summary
    student, tokenizer = work.take(round_.start)
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
    stage = run.stage(str(round_.distilled), _training_inputs(work, round_) | {"distill": as_dict(round_.distill)})
    if stage.summary is not None:
        return stage.summary
    data = _data(work, round_, functools.partial(blocks.order, round_.seed, share=round_.share))
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


def search_rate(work: Work, round_: Round, rates: Sequence[float]) -> float:
    """Stage `search`: of `rates`, the learning rate whose loss on the validation blocks is lowest after a quarter of an
    epoch, by the round's own objective. One rate needs no search."""
    if len(rates) == 1:
        return rates[0]
    wanted = as_dict(round_.distill) | {"learning_rate": None}
    stage = work.run.stage(
        f"{round_.name}/search", _training_inputs(work, round_) | {"distill": wanted, "rates": list(rates)}
    )
    if stage.summary is not None:
        return stage.summary["learning_rate"]
    ids = work.blocks.order(round_.seed, 0, round_.share)
    data = _data(work, round_, lambda epoch: ids[: max(1, len(ids) // 4)])
    losses: dict[str, float] = {}
    for rate in rates:
        tried = stage.folder / f"rate-{rate:g}.json"
        if tried.exists():
            loss = files.read_json(tried)["loss"]
        else:
            student, _ = work.take(round_.student, torch.float32)
            options = replace(round_.distill, learning_rate=rate, epochs=1, validations=1, trackers=[])
            loss = distillation.train(student, data, options).validations[-1].loss
            work.run.processes.wait()  # all have seen that it was not tried
            if work.run.processes.is_main:
                files.write_json(tried, {"loss": loss})
        losses[f"{rate:g}"] = loss
        work.run.console.say(f"  rate {rate:g}: validation loss {loss:.3f}")
    best = min(rates, key=lambda rate: losses[f"{rate:g}"])
    return stage.finish({"losses": losses, "learning_rate": best})["learning_rate"]


def _training_inputs(work: Work, round_: Round) -> dict[str, Any]:
    return {
        "start": work.identity(round_.student),
        "teacher": files.read_json(work.run.folder / round_.cache / "inputs.json"),
        "seed": round_.seed,
        **_share(round_),
    }


def _share(round_: Round) -> dict[str, str]:
    """For the inputs of a stage."""
    return {} if round_.share == corpus.ALL else {"share": str(round_.share)}


def _data(work: Work, round_: Round, order: Callable[[int], np.ndarray]) -> distillation.Data:
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
    again."""
    options, texts = work.recipe.evaluate, work.blocks.texts
    named = round_.models(work.dense)
    about_tasks = {"tasks", "task_limit", "skip_missing_tasks"}
    inputs = {
        "models": {name: work.identity(where) for name, where in named.items()},
        "corpus": work.blocks.fingerprint,
        "evaluate": {key: value for key, value in as_dict(options).items() if key not in about_tasks},
    }
    stage = work.run.stage(str(round_.evaluation), inputs)
    if stage.summary is not None:
        return stage.summary
    together = [tuple(named)] if options.agreement else [(name,) for name in named]  # one at a time needs less memory
    for names in together:
        compared = _Compared(work, {name: named[name] for name in names})
        for text, content in texts.items():
            _measure(compared, text, content, stage.folder)
    results = {name: {text: files.read_json(_result(stage.folder, name, text)) for text in texts} for name in named}
    return stage.finish({"models": results})


def score_tasks(work: Work, where: Place) -> dict[str, Any]:
    """Stage `tasks`: a model's scores on the recipe's tasks. The dense model's serve all rounds."""
    options, root, console = work.recipe.evaluate, work.recipe.corpus.root, work.run.console
    inputs = {
        "model": work.identity(where),
        "tasks": options.tasks,
        "limit": options.task_limit,
        "files": {name: files.file_sha256(path) for name, path in harness.local_files(options.tasks, root).items()},
    }
    stage = work.run.stage(str(tasks_folder(where)), inputs)
    if stage.summary is not None:
        return stage.summary["scores"]
    model, tokenizer = work.open(where)
    found = harness.run_tasks(
        model,
        tokenizer,
        options.tasks,
        root=root,
        limit=options.task_limit,
        skip_missing=options.skip_missing_tasks,
        batch_size=options.batch_size,
    )
    for result in found.values():
        if result.skipped is not None:
            console.say(f"  skipped: {result.skipped}")
    return stage.finish({"scores": {task: result.as_dict() for task, result in found.items()}})["scores"]


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


def _measure(compared: _Compared, text: str, content: str, folder: Path) -> None:
    """Writes a file for each of the models: what the text says about it."""
    options = compared.work.recipe.evaluate
    if all(_result(folder, name, text).exists() for name in compared.names):
        return
    bound = options.max_tokens or len(corpus.encode(compared.tokenizer, content))
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
        )
    for name, measurement in found.items():
        files.write_json(_result(folder, name, text), measurement.as_dict())


def _result(folder: Path, name: str, text: str) -> Path:
    return folder / f"{name}-text-{text}.json"
