"""`sparsekd export`: a model as a folder for the software that serves it, compared with PyTorch before it is kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsekd.cli import printing
from sparsekd.cli.options import AsJson, Revision

if TYPE_CHECKING:
    from sparsekd.export import Source


def command(
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A finished run, or a model.")],
    format_: Annotated[
        str, typer.Option("--format", help="hf (vLLM serves it too), dense, onnx, openvino or gguf.")
    ] = "hf",
    weights: Annotated[str | None, typer.Option(help="Number format of the weights; each format has its own.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="New folder.  [default: export/FORMAT in the run, or exports/NAME-FORMAT]")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="A text to compare on (.txt, .jsonl, .parquet).")] = None,
    revision: Revision = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a model for the software that serves it, open it there, and compare."""
    import torch

    from sparsekd import corpus, export, models
    from sparsekd.recipe import Corpus, Text

    printing.quiet()
    export.format_named(format_)
    source = export.locate(target, revision)
    folder = out or _default_folder(source, format_, weights)
    export.require_free(folder)
    content = None if text is None else corpus.read_text(Text(path=str(text)), Corpus())
    model, tokenizer = models.load(
        source.name, revision=revision, dtype=torch.float32, trust_remote_code=trust_remote_code
    )
    found = export.export(model, tokenizer, format_, folder, source, weights=weights, text=content)
    printing.print_export(folder, found, as_json)


def _default_folder(source: Source, format_: str, weights: str | None) -> Path:
    """In the run; of a model `exports/NAME-FORMAT`, here. A number format that was asked for is in the name."""
    kind = format_ if weights is None else f"{format_}-{weights}"
    if source.run is not None:
        return source.run / "export" / kind
    return Path("exports") / f"{Path(source.name).name.removesuffix('.gguf')}-{kind}"
