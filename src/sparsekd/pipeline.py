"""The paper's procedure, top to bottom: corpus, cache, compress, distill, evaluate, report.

Each stage is a function that takes the run and what earlier stages made; each reuses its own finished output. The
dense model is loaded only when a stage needs it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsekd import cache as caches
from sparsekd import compression, corpus, distillation, files, models, report, sources, teacher
from sparsekd.cache import WHOLE, Cache, Part, Targets
from sparsekd.compression import spectrum as spectra
from sparsekd.console import Console
from sparsekd.corpus import Corpus
from sparsekd.device import Placement, place
from sparsekd.errors import QualityError, UsageError
from sparsekd.evaluate import harness, measure
from sparsekd.objective import Teacher
from sparsekd.recipe import Recipe, as_dict
from sparsekd.run import Run, Stage, stop_signals

STAGES = ("corpus", "cache", "compress", "distill", "evaluate", "report")
_ROUND = "round-01"
_CORPUS = "corpus"
_CACHE, _COMPRESSED = f"{_ROUND}/cache", f"{_ROUND}/compressed"
_DISTILLED, _EVALUATION = f"{_ROUND}/distilled", f"{_ROUND}/eval"
_MODELS = ("dense", "compressed", "distilled")


def run(
    recipe: Recipe,
    folder: Path,
    *,
    until: str = "report",
    resume: bool = False,
    fresh: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Runs the stages up to `until` in `folder` and returns the summary of each by name.

    Finished stages are reused. Raises what the stages raise; whatever was finished stays and the next call continues.
    `QualityError` comes last, after the report is written: the distilled model is worse than before distillation.
    """
    _check_before_starting(recipe)
    with Run.open(folder, recipe, console or Console(), resume=resume, fresh=fresh) as opened:
        dense = Dense(opened)
        blocks = make_corpus(opened, dense)
        summaries = {"corpus": blocks[1]}
        steps = {
            "cache": lambda: fill_cache(opened, dense, blocks[0]),
            "compress": lambda: truncate(opened, dense, blocks[0]),
            "distill": lambda: train(opened, dense, blocks[0]),
            "evaluate": lambda: evaluate(opened, dense, blocks[0]),
        }
        for name, step in steps.items():
            if STAGES.index(name) <= STAGES.index(until):
                summaries[name] = step()
        if until == "report":
            written = report.write(folder)
            opened.console.say(f"report: {folder / 'report.html'}")
            _quality_gate(written)
        return summaries


def _check_before_starting(recipe: Recipe) -> None:
    """Raises `UsageError` for what would otherwise stop the run hours from now."""
    model, options = recipe.model, recipe.evaluate
    models.find_mlps(models.skeleton(model.name, revision=model.revision, trust_remote_code=model.trust_remote_code))
    harness.check(options.tasks, recipe.corpus.root, skip_missing=options.skip_missing_tasks)


class Dense:
    """The model to compress: its identity at once, its weights on first use."""

    def __init__(self, opened: Run):
        self._run = opened
        self.placement = place(opened.recipe.device, opened.recipe.model.dtype)

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        model = self._run.recipe.model
        return {
            "name": model.name,
            "revision": model.revision,
            "content": models.source_hash(model.name),
            "dtype": str(self.placement.dtype).removeprefix("torch."),
        }

    @functools.cached_property
    def loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        name = self._run.recipe.model.name
        self._run.console.say(f"loading {name} ({self.placement.device}, {self.placement.reason})")
        return _load(self._run.recipe, self.placement)

    @property
    def model(self) -> PreTrainedModel:
        return self.loaded[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.loaded[1]


def _load(recipe: Recipe, placement: Placement) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return models.load(
        recipe.model.name,
        revision=recipe.model.revision,
        dtype=placement.dtype,
        device=placement.device,
        trust_remote_code=recipe.model.trust_remote_code,
    )


def make_corpus(opened: Run, dense: Dense) -> tuple[Corpus, dict[str, Any]]:
    """Stage `corpus`: the token blocks, built or read back, and the stage's summary."""
    recipe = opened.recipe
    places = [*recipe.corpus.sources.values(), *recipe.evaluate.texts.values()]
    paths = sorted({place.path for place in places if place.path is not None})
    inputs = {
        "model": dense.identity,
        "corpus": as_dict(recipe.corpus),
        "texts": {name: as_dict(text) for name, text in recipe.evaluate.texts.items()},
        "files": {path: files.file_sha256(sources.resolve(path, recipe.corpus.root)) for path in paths},
        "seed": recipe.seed,
    }
    stage = opened.stage(_CORPUS, inputs)
    if stage.summary is not None:
        return corpus.load(stage.folder), stage.summary
    built = corpus.build(recipe.corpus, recipe.evaluate.texts, dense.tokenizer, recipe.seed)
    corpus.save(built, stage.folder)
    for name, source in built.reports.items():
        if source.dropped_documents:
            opened.console.say(
                f"  leak guard: {name}: {source.dropped_documents} of {source.documents} documents dropped, "
                f"{source.leaked_sequences} sequences of {corpus.GUARD_WORDS} words are in an evaluation text"
            )
        if source.drawn > source.blocks:
            opened.console.say(f"  {name}: {source.blocks} blocks repeat to fill its share of {source.drawn}")
    summary = {
        "fingerprint": built.fingerprint,
        "blocks": len(built.train_ids),
        "distinct_blocks": len(built.blocks) - len(built.validation_ids),
        "validation_blocks": len(built.validation_ids),
        "tokens": built.num_tokens,
        "sources": {name: vars(source) for name, source in built.reports.items()},
    }
    return built, stage.finish(summary)


def fill_cache(opened: Run, dense: Dense, blocks: Corpus, part: Part = WHOLE) -> dict[str, Any]:
    """Stage `cache`: the dense model's distributions of all training and validation blocks, or one `part` of them."""
    options = opened.recipe.cache
    stage = _cache_stage(opened, dense, blocks)
    if opened.recipe.distill.teacher == "online":  # an empty stage, so that later ones find its inputs
        return stage.summary or stage.finish({"blocks": 0, "tokens": 0, "top_k": options.top_k, "bytes": 0})
    if stage.summary is not None and caches.is_complete(stage.folder):  # else a shard was removed: it is made again
        return stage.summary
    by_id = {block_id: block.tokens for block_id, block in enumerate(blocks.blocks)}
    num_tokens = sum(len(tokens) for tokens in by_id.values()) // part.count
    with opened.console.bar("caching", num_tokens) as bar:
        cache = teacher.fill(
            dense.model,
            stage.folder,
            by_id,
            tokenizer=models.tokenizer_hash(dense.tokenizer),
            corpus_fingerprint=blocks.fingerprint,
            codec=options.codec,
            top_k=options.top_k,
            vocab_size=models.real_vocab_size(dense.model, dense.tokenizer),
            seed=opened.recipe.seed,
            blocks_per_shard=options.blocks_per_shard,
            batch_size=options.batch_size,
            part=part,
            separator=blocks.separator,
            on_tokens=lambda count: bar.advance(count, f"{num_tokens} tokens"),
        )
    return {"part": str(part)} if cache is None else stage.finish(_cache_summary(cache, blocks))


def _cache_stage(opened: Run, dense: Dense, blocks: Corpus) -> Stage:
    if opened.recipe.distill.teacher == "online":
        return opened.stage(_CACHE, {"teacher": "online"})
    inputs = {"model": dense.identity, "corpus": blocks.fingerprint, "cache": as_dict(opened.recipe.cache)}
    return opened.stage(_CACHE, inputs)


def _cache_summary(cache: Cache, blocks: Corpus) -> dict[str, Any]:
    num_tokens = sum(len(block.tokens) for block in blocks.blocks)
    facts = {"blocks": len(blocks.blocks), "tokens": num_tokens, "top_k": cache.top_k, "bytes": cache.num_bytes}
    return facts | {"identity": cache.identity}


def _open_cache(opened: Run, needed: Iterable[int]) -> Cache:
    """The finished cache of this run and no other, if it covers the blocks that are `needed`."""
    cache = Cache(opened.folder / _CACHE, files.read_json(opened.folder / _CACHE / "stage.json")["identity"])
    cache.require(needed)
    return cache


def cache_part(recipe: Recipe, folder: Path, part: Part, console: Console | None = None) -> dict[str, Any]:
    """What one of several processes does for stage `cache`: any scheduler may start them, in any order, anywhere.

    They share the run directory, whose corpus must be finished; `merge_cache` then makes the stage whole.
    """
    if not (folder / _CORPUS / "stage.json").exists():
        raise UsageError(f"{folder} has no finished corpus: run sparsekd corpus with this recipe and --out first")
    with Run.open(folder, recipe, console or Console(), resume=True, shared=True) as opened:
        dense = Dense(opened)
        blocks, _ = make_corpus(opened, dense)
        return fill_cache(opened, dense, blocks, part)


def merge_cache(recipe: Recipe, folder: Path, console: Console | None = None) -> dict[str, Any]:
    """Finishes stage `cache` from what all parts have written; raises `DataError` naming the part that is missing."""
    with Run.open(folder, recipe, console or Console(), resume=True) as opened:
        dense = Dense(opened)
        blocks, _ = make_corpus(opened, dense)
        stage = _cache_stage(opened, dense, blocks)
        return stage.finish(_cache_summary(caches.merge(stage.folder, range(len(blocks.blocks))), blocks))


def truncate(opened: Run, dense: Dense, blocks: Corpus) -> dict[str, Any]:
    """Stage `compress`: the dense model with low-rank MLPs, in `compressed/model`."""
    options = opened.recipe.compress
    inputs = {
        "model": dense.identity,
        "corpus": blocks.fingerprint,
        "compress": as_dict(options),
        "seed": opened.recipe.seed,
        "ranks": files.file_sha256(Path(options.ranks_from)) if options.ranks_from else None,
    }
    stage = opened.stage(_COMPRESSED, inputs)
    if stage.summary is not None:
        return stage.summary
    student, tokenizer = dense.loaded
    del dense.loaded  # it is changed in place here; a later stage that needs the dense one reads it again
    batches = _statistics_batches(blocks, opened.recipe)
    online = opened.recipe.distill.teacher == "online"
    if options.offload:
        torch.nn.Module.to(student, "cpu")
    plan = compression.truncate(
        student,
        batches,
        options,
        seed=opened.recipe.seed,
        teacher=None if online or opened.recipe.cache.codec == "sampled" else _cached(opened, blocks),
        device=dense.placement.device,
        warn=opened.console.warn,
    )
    models.save(student, tokenizer, stage.folder / "model", dtype=_checkpoint_dtype(dense))
    opened.console.say(
        f"  removed {plan.mlp_reduction:.1%} of the MLP parameters, {plan.model_reduction:.1%} of the whole model"
    )
    return stage.finish(plan.as_dict())


def _cached(opened: Run, blocks: Corpus) -> Callable[[torch.Tensor], Targets]:
    """The cached distributions of a block by its tokens."""
    cache = _open_cache(opened, blocks.train_ids.tolist())
    ids = {block.tokens.tobytes(): block_id for block_id, block in enumerate(blocks.blocks)}

    def read(tokens: torch.Tensor) -> Targets:
        block = tokens.numpy().astype(np.int32)
        targets = cache.read(ids[block.tobytes()], block)
        assert isinstance(targets, Targets)
        return targets

    return read


def _teacher(opened: Run, dense: Dense, blocks: Corpus) -> Teacher:
    recipe = opened.recipe
    if recipe.distill.teacher == "cache":
        return _open_cache(opened, {*blocks.train_ids.tolist(), *blocks.validation_ids.tolist()})
    vocab_size = models.real_vocab_size(dense.model, dense.tokenizer)
    return teacher.Online(dense.model, recipe.cache.top_k, vocab_size, blocks.separator)


def train(opened: Run, dense: Dense, blocks: Corpus) -> dict[str, Any]:
    """Stage `distill`: the compressed model trained to match the cache, in `distilled/model`."""
    recipe = opened.recipe
    inputs = {
        "compressed": files.read_json(opened.folder / _COMPRESSED / "inputs.json"),
        "cache": files.read_json(opened.folder / _CACHE / "inputs.json"),
        "distill": as_dict(recipe.distill),
    }
    stage = opened.stage(_DISTILLED, inputs)
    if stage.summary is not None:
        return stage.summary
    data = distillation.Data(
        [block.tokens for block in blocks.blocks],
        functools.partial(blocks.order, recipe.seed),
        blocks.validation_ids.tolist(),
        _teacher(opened, dense, blocks),
        [block.source for block in blocks.blocks],
        blocks.separator,
    )
    dense_ce = distillation.measure(dense.model, data, recipe.distill).ce
    if recipe.distill.teacher == "cache":
        del dense.loaded  # room for the student; the evaluation reads it again
    student, tokenizer = models.load(
        str(opened.folder / _COMPRESSED / "model"), dtype=torch.float32, device=dense.placement.device
    )
    num_tokens = blocks.num_tokens * recipe.distill.epochs
    with opened.console.bar("training", num_tokens) as bar, stop_signals() as received:
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
            recipe.distill,
            folder=stage.folder,
            dense_ce=dense_ce,
            on_step=on_step,
            on_validation=lambda v: opened.console.say(
                f"  validation after step {v.step}: loss {v.loss:.3f}, KD {v.kd:.3f}, cross-entropy {v.ce:.3f}, "
                f"agreement {v.agreement:.1%}"
            ),
            say=opened.console.say,
            stop_signal=lambda: received[0] if received else None,
        )
    opened.console.say(f"  {history.stop_reason}; weights after step {history.best_step} kept")
    models.save(student, tokenizer, stage.folder / "model", dtype=_checkpoint_dtype(dense))
    files.remove(stage.folder / "checkpoints")
    return stage.finish(history.as_dict())


def evaluate(opened: Run, dense: Dense, blocks: Corpus) -> dict[str, Any]:
    """Stage `evaluate`: the three models on every text and task; what was measured already is not measured again."""
    options, root = opened.recipe.evaluate, opened.recipe.corpus.root
    inputs = {
        "distilled": files.read_json(opened.folder / _DISTILLED / "inputs.json"),
        "evaluate": as_dict(options),
        "task_files": {
            name: files.file_sha256(path) for name, path in harness.local_files(options.tasks, root).items()
        },
    }
    stage = opened.stage(_EVALUATION, inputs)
    if stage.summary is not None:
        return stage.summary
    together = [_MODELS] if options.agreement else [(name,) for name in _MODELS]  # one at a time needs less memory
    for names in together:
        loaded = Loaded(opened, dense, blocks, names)
        for text, content in blocks.texts.items():
            _measure(loaded, text, content, stage.folder)
        for name in names:
            _run_tasks(loaded, name, stage.folder)
    texts = {
        name: {text: files.read_json(_result(stage.folder, name, text)) for text in blocks.texts} for name in _MODELS
    }
    tasks = {name: files.read_json(_tasks(stage.folder, name)) for name in _MODELS} if options.tasks else {}
    return stage.finish({"models": texts, "tasks": tasks})


def spectrum(recipe: Recipe) -> dict[str, Any]:
    """The spectra of a model's MLP matrices on the recipe's corpus; keeps nothing."""
    model, tokenizer = _load(recipe, place(recipe.device, recipe.model.dtype))
    batches: list[torch.Tensor] = []
    if recipe.compress.method != "svd":
        blocks = corpus.build(recipe.corpus, recipe.evaluate.texts, tokenizer, recipe.seed)
        batches = _statistics_batches(blocks, recipe)
    found = spectra.spectrum(model, batches, recipe.compress, seed=recipe.seed, warn=Console().warn)
    return spectra.as_dict(found, recipe.compress)


class Loaded:
    """Some of the models to evaluate, and what is worked out from them, on first use."""

    def __init__(self, opened: Run, dense: Dense, blocks: Corpus, names: tuple[str, ...]):
        self.run, self._dense, self._blocks, self.names = opened, dense, blocks, names

    @functools.cached_property
    def models(self) -> dict[str, PreTrainedModel]:
        return {name: model for name, (model, _) in self._loaded.items()}

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._loaded[self.names[0]][1]

    @functools.cached_property
    def token_counts(self) -> torch.Tensor:
        """How often each token occurs in the distinct training blocks."""
        learned = np.concatenate(self._blocks.tokens(np.unique(self._blocks.train_ids).tolist()))
        vocab_size = self.models[self.names[0]].config.get_text_config().vocab_size
        return torch.from_numpy(np.bincount(learned, minlength=vocab_size))

    @functools.cached_property
    def _loaded(self) -> dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
        return {name: self._load(name) for name in self.names}

    def _load(self, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        if name == "dense":
            return self._dense.loaded
        folder = self.run.folder / {"compressed": _COMPRESSED, "distilled": _DISTILLED}[name] / "model"
        return models.load(str(folder), dtype=self._dense.placement.dtype, device=self._dense.placement.device)


def _measure(loaded: Loaded, text: str, content: str, folder: Path) -> None:
    """Writes a file for each of the loaded models: what the text says about it."""
    options = loaded.run.recipe.evaluate
    if all(_result(folder, name, text).exists() for name in loaded.names):
        return
    bound = options.max_tokens or len(corpus.encode(loaded.tokenizer, content))
    passes = len(loaded.names) * options.context / options.stride
    with loaded.run.console.bar(f"evaluating {' and '.join(loaded.names)} on {text}", round(bound * passes)) as bar:
        found = measure(
            loaded.models,
            loaded.tokenizer,
            content,
            teacher="dense" if options.agreement else None,
            token_counts=loaded.token_counts if options.agreement else None,
            context=options.context,
            stride=options.stride,
            max_tokens=options.max_tokens,
            batch_size=options.batch_size,
            on_tokens=bar.advance,
        )
    for name, measurement in found.items():
        files.write_json(_result(folder, name, text), measurement.as_dict())


def _run_tasks(loaded: Loaded, name: str, folder: Path) -> None:
    """Writes a file of the model's scores on the recipe's tasks, if it has any."""
    options, console = loaded.run.recipe.evaluate, loaded.run.console
    if not options.tasks or _tasks(folder, name).exists():
        return
    console.say(f"  {name} on {', '.join(options.tasks)}")
    found = harness.run_tasks(
        loaded.models[name],
        loaded.tokenizer,
        options.tasks,
        root=loaded.run.recipe.corpus.root,
        limit=options.task_limit,
        skip_missing=options.skip_missing_tasks,
        batch_size=options.batch_size,
    )
    for result in found.values():
        if result.skipped is not None:
            console.say(f"  skipped: {result.skipped}")
    files.write_json(_tasks(folder, name), {task: result.as_dict() for task, result in found.items()})


def _result(folder: Path, name: str, text: str) -> Path:
    return folder / f"{name}-text-{text}.json"


def _tasks(folder: Path, name: str) -> Path:
    return folder / f"{name}-tasks.json"


def _statistics_batches(blocks: Corpus, recipe: Recipe) -> list[torch.Tensor]:
    """Batches of equally long training blocks, in the first epoch's order, enough for statistics and probe."""
    batches, batch, total = [], [], 0
    for block_id in blocks.order(recipe.seed, 0):
        tokens = blocks.blocks[block_id].tokens
        if batch and (len(batch) == recipe.compress.batch_size or len(tokens) != len(batch[0])):
            batches.append(batch)
            batch = []
        batch.append(tokens)
        total += len(tokens)
        if total >= recipe.compress.num_tokens + recipe.compress.probe_tokens:
            break
    return [torch.from_numpy(np.stack(batch).astype(np.int64)) for batch in [*batches, batch]]


def _checkpoint_dtype(dense: Dense) -> torch.dtype:
    """Results are saved in the number format that the dense checkpoint has, so that sizes compare."""
    return models.checkpoint_dtype(dense.identity["name"], dense.identity["revision"])


def _quality_gate(written: dict[str, Any]) -> None:
    evaluated = written["evaluation"]["models"]
    worse = [
        text
        for text, result in evaluated["distilled"].items()
        if result["perplexity"] > evaluated["compressed"][text]["perplexity"]
    ]
    if worse and len(worse) == len(evaluated["distilled"]):
        raise QualityError(f"distillation made the model worse on {', '.join(worse)}: lower distill.learning_rate")
