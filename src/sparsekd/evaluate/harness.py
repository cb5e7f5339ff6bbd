"""Tasks of EleutherAI's lm-evaluation-harness, through its Python API.

A name such as `hellaswag` is the harness's own task, whose data comes from the Hub. A name that starts with `local_` is
one of the files in `tasks/` here: the same task on a local file, for which nothing is asked of the network or stored.
"""

from __future__ import annotations

import contextlib
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsekd.corpus import sources
from sparsekd.errors import DataError, ResourceError, SparseKDError, UsageError
from sparsekd.models import float32_head
from sparsekd.recipe import expanded
from sparsekd.records import Record

_FOLDER = Path(__file__).parent / "tasks"
_PREFIX = "local_"
_MAX_LENGTH = 2048  # what the harness takes for models that name no length; some name one that no memory holds
_BOOTSTRAPS = 1000  # samples where the harness has no formula for an error
_FEWSHOT_SEED = 1234  # the harness's own


@dataclass(frozen=True)
class Score:
    """One metric of a task; None where the harness knows no standard error."""

    value: float
    standard_error: float | None


@dataclass(frozen=True)
class TaskResult:
    """Metrics by name over `num_rows` rows, or why the task was skipped."""

    scores: dict[str, Score]
    num_rows: int
    skipped: str | None = None

    def as_dict(self) -> Record:
        return asdict(self)


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    root: str | None = None,
    limit: int | None = None,
    skip_missing: bool = False,
    batch_size: int = 2,
) -> dict[str, TaskResult]:
    """Scores of `model` on each task by name; a group of tasks also gives those of its members.

    `root` is the folder that the local tasks' files are relative to, `limit` the number of rows of each task. A task
    that is not available here raises `DataError` naming it, or with `skip_missing` becomes a result that says so.
    """
    found, missing = _find(tasks, root, skip_missing)
    skipped = {name: TaskResult({}, 0, reason) for name, reason in missing.items()}
    if not found["tasks"]:
        return skipped
    with float32_head(model):  # the harness takes logits as they are
        return _evaluate(language_model(model, tokenizer, batch_size), found, limit) | skipped


def texts(tasks: Sequence[str], root: str | None, *, skip_missing: bool = False) -> dict[str, str]:
    """All that is written in the documents that each task scores, by its name; of a group by those of its members.

    For a guard that keeps them out of training. A task that is not available here raises `DataError`, or with
    `skip_missing` is left out.
    """
    if not tasks:
        return {}
    found, _ = _find(tasks, root, skip_missing)
    return {name: "\n".join(_strings(list(task.eval_docs))) for name, task in found["tasks"].items()}


def _find(
    tasks: Sequence[str], root: str | None, skip_missing: bool
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The tasks as the harness takes them, and why others, which may be missing, are not available here."""
    check(tasks, root, skip_missing=skip_missing)
    found: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    missing = {}
    manager = _manager(tasks)
    for name in tasks:
        try:
            for kind, members in _load(manager, name, root).items():
                found[kind] |= members
        except DataError as error:
            if not skip_missing:
                raise
            missing[name] = str(error)
    return found, missing


def _strings(value: Any) -> Iterator[str]:
    """The strings in nested lists and dicts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _strings(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _strings(inner)


def check(tasks: Sequence[str], root: str | None, *, skip_missing: bool = False) -> None:
    """Raises, before any model runs, `UsageError` for a local task that is not known, `DataError` for one whose file
    is missing, unless it may be skipped, and `ResourceError` when the harness is not installed."""
    if tasks:
        _import_harness()
    for name in tasks:
        if name.startswith(_PREFIX):
            file = _description(name)["dataset_kwargs"]["data_files"]["test"]
            if not skip_missing:
                sources.resolve(file, root)


def is_local(task: str) -> bool:
    """Whether a task reads a local file, and nothing from the Hub."""
    return task.startswith(_PREFIX)


def local_files(tasks: Sequence[str], root: str | None) -> dict[str, Path]:
    """The file of each local task whose file is there."""
    files = {
        name: expanded(root or ".") / _description(name)["dataset_kwargs"]["data_files"]["test"]
        for name in tasks
        if name.startswith(_PREFIX)
    }
    return {name: path for name, path in files.items() if path.is_file()}


def language_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, **options: Any) -> Any:
    """A loaded model, dense or compressed, as the harness wants it; `options` go to its `HFLM`."""
    from lm_eval.models.huggingface import HFLM

    wrapper: Any = HFLM  # a decorator of the harness hides its parameters
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", _MAX_LENGTH)
    options = {"max_length": min(longest, _MAX_LENGTH)} | options
    return wrapper(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size, **options)


def _import_harness() -> Any:
    try:
        import lm_eval.tasks
    except ImportError:
        raise ResourceError('harness tasks need a package: pip install "sparsekd[harness]"') from None
    return lm_eval


def _manager(tasks: Sequence[str]) -> Any:
    own = not all(name.startswith(_PREFIX) for name in tasks)  # reading the harness's thousands of tasks takes seconds
    return _import_harness().tasks.TaskManager(include_defaults=own)


def _load(manager: Any, name: str, root: str | None) -> dict[str, Any]:
    try:
        return manager.load([_local(name, root) if name.startswith(_PREFIX) else name])
    except SparseKDError:
        raise
    except Exception as error:  # the harness and datasets raise almost any class
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"task {name} is not available here: {reason}") from error


def _description(name: str) -> dict[str, Any]:
    path = _FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in _FOLDER.glob("*.yaml")))
        raise UsageError(f"task {name}: there is no such local task; known are {known}")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _local(name: str, root: str | None) -> dict[str, Any]:
    """A local task with its rows in memory: through `dataset_path` the rows would be copied to a cache in the home
    folder, and the Hub told that they were read."""
    import datasets

    description = _description(name)
    path = sources.resolve(description["dataset_kwargs"]["data_files"]["test"], root)
    rows = [row for _, row in sources.read_jsonl(path)] if path.suffix == ".jsonl" else _articles(path)
    if name == "local_wikitext":
        from lm_eval.tasks.wikitext import preprocess_wikitext as own

        description |= {"doc_to_target": own.wikitext_detokenizer, "process_results": own.process_results}
    test = datasets.Dataset.from_list(rows)
    return description | {"custom_dataset": lambda **options: {"test": test}}


def _articles(path: Path) -> list[dict[str, str]]:
    """The articles of a WikiText file: each begins with a heading of the first level, ` = Title = `."""
    pages = re.split(r"(?m)^(?= = [^=\n]+ = $)", sources.read_txt(path))
    return [{"page": page} for page in pages if page.strip()]


def _evaluate(lm: Any, found: dict[str, Any], limit: int | None) -> dict[str, TaskResult]:
    for task in found["tasks"].values():
        task.set_fewshot_seed(_FEWSHOT_SEED)
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for results, and the harness prints its progress
        answer = _import_harness().evaluate(lm, found, limit=limit, bootstrap_iters=_BOOTSTRAPS, log_samples=False)
    return {
        name: TaskResult(_scores(name, metrics), metrics["sample_len"])
        for name, metrics in answer["results"].items()
        if "sample_len" in metrics
    }


def _scores(task: str, metrics: dict[str, Any]) -> dict[str, Score]:
    """The harness's flat `{"acc,none": value, "acc_stderr,none": error}` by metric."""
    scores = {}
    for key, value in metrics.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        if not math.isfinite(value):
            raise DataError(f"task {task}: the model's {metric} is not finite")
        error = metrics.get(f"{metric}_stderr,{kind}")
        known = isinstance(error, float) and math.isfinite(error)
        scores[metric if kind == "none" else f"{metric} ({kind})"] = Score(value, error if known else None)
    return scores
