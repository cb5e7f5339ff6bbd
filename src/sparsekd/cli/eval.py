"""`sparsekd eval`: what any model, dense or compressed, is worth on texts and tasks."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsekd.cli import printing
from sparsekd.cli.options import AsJson, Device, Revision
from sparsekd.errors import DataError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsekd.records import Record


def command(
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

    printing.quiet()
    names = [name.strip() for name in tasks.split(",")] if tasks else []
    if not text and not names:
        raise UsageError("there is nothing to evaluate on: give --text FILE, --tasks NAME or both")
    if teacher is not None and not text:
        raise UsageError("--teacher compares on texts: give --text FILE as well")
    if stride > context:
        raise UsageError(f"--stride is {stride}: expected at most --context ({context})")
    folder = str(root) if root else None
    harness.check(names, folder)
    contents = {title: corpus.read_text(Text(path=str(path)), Corpus()) for path, title in _titles(text or []).items()}
    placement = place(device or "auto", dtype or "auto")
    load = functools.partial(
        models.load, dtype=placement.dtype, device=placement.device, trust_remote_code=trust_remote_code
    )
    model = model_name(model)
    loaded, tokenizer = load(model, revision=revision)
    compared = {model: loaded}
    if teacher is not None:
        teacher = model_name(teacher, [model])
        reference, its_tokenizer = load(teacher)
        if models.tokenizer_hash(its_tokenizer) != models.tokenizer_hash(tokenizer):
            raise DataError(
                f"--teacher {teacher}: its tokenizer is not that of {model}, so their tokens do not compare"
            )
        compared = {teacher: reference, model: loaded}
    with placement.products():
        measured = _measure_texts(compared, tokenizer, contents, teacher, context, stride, max_tokens)
        scores = harness.run_tasks(loaded, tokenizer, names, root=folder, limit=limit) if names else {}
    found = {
        "models": measured,
        "continuations": _continuations(compared, tokenizer),
        "tasks": {model: {name: score.as_dict() for name, score in scores.items()}},
    }
    printing.print_evaluation(found, as_json)


def _titles(paths: list[Path]) -> dict[Path, str]:
    """What each text is called: its file name, or the whole path where two share one."""
    names = [path.name for path in paths]
    return {path: path.name if names.count(path.name) == 1 else str(path) for path in paths}


def _measure_texts(
    compared: dict[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    contents: dict[str, str],
    teacher: str | None,
    context: int,
    stride: int,
    max_tokens: int | None,
) -> dict[str, dict[str, Record]]:
    """What `measure` says, by model and text, with a bar for each text."""
    from sparsekd import corpus
    from sparsekd.console import Console
    from sparsekd.evaluate import measure

    results: dict[str, dict[str, Record]] = {name: {} for name in compared}
    for title, content in contents.items():
        num_tokens = min(max_tokens or sys.maxsize, len(corpus.encode(tokenizer, content)))
        expected = num_tokens * context // stride * len(compared)
        with Console().bar(f"evaluating {title}", expected) as bar:
            found = measure(
                compared,
                tokenizer,
                content,
                teacher=teacher,
                context=context,
                stride=stride,
                max_tokens=max_tokens,
                on_tokens=bar.advance,
            )
        for name, measurement in found.items():
            results[name][title] = measurement.as_dict()
    return results


def _continuations(compared: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Record]]:
    """What each model says after our prompts, beside the first one."""
    from sparsekd.console import Console
    from sparsekd.evaluate import continuations
    from sparsekd.recipe import PROMPTS

    said = {}
    for name, model in compared.items():
        with Console().bar(f"what {name} says", len(PROMPTS) * continuations.NUM_TOKENS) as bar:
            said[name] = continuations.generate(model, tokenizer, PROMPTS, on_tokens=bar.advance)
    return continuations.compare(said)
