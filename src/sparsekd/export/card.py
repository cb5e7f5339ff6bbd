"""README.md of an exported model: what it was made from, what was removed, what it is worth, how it is used."""

from __future__ import annotations

import functools
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from sparsekd import files, models
from sparsekd.export._gguf_tensors import field as field_of
from sparsekd.export.source import Source
from sparsekd.records import Record
from sparsekd.run import planned, read_recipe, read_summary

FILE = "README.md"
_LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING")
_FIELDS = ("license", "license_name", "license_link")  # of a card's head
_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=False,  # noqa: S701 (Markdown)
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass(frozen=True)
class Licence:
    """What the base says of its licence: fields for the head of a card, and files with the text."""

    fields: dict[str, str] = field(default_factory=dict)
    texts: list[Path] = field(default_factory=list)


def write(folder: Path, model: PreTrainedModel, source: Source, record: Record, usage: str | None) -> None:
    """Writes README.md, and copies the base's licence beside it."""
    base, revision = _base(model, source)
    licence = Licence() if base is None else licence_of(base, revision)
    for text in licence.texts:
        shutil.copyfile(text, folder / text.name)
    described = models.forms.description_of(model)
    tags = ["sparsekd"] if described is None else ["sparsekd", described.form, described.method]
    head: dict[str, Any] = {**licence.fields, "pipeline_tag": "text-generation", "tags": tags}
    head["library_name"] = "transformers" if (folder / "config.json").exists() else record["format"]
    if base and _is_hub_id(base):
        head["base_model"] = base
    made = f"Made from {base or 'a model that is not known here'} by sparsekd."
    text = _TEMPLATES.get_template("card.md.jinja").render(
        head=ModelCardData(**head).to_yaml(),
        title=Path(base or source.name).name + ("" if described is None else ", made smaller"),
        made=made,
        facts=[*_removed(model), *record["notes"]],
        texts=_perplexities(source),
        checked=_checked(record),
        usage=usage,
        licence=_said(licence, base),
    )
    files.write_text(folder / FILE, text)


def _base(model: PreTrainedModel, source: Source) -> tuple[str | None, str | None]:
    """Name and revision of the model that something was removed from; a dense model is its own base."""
    if source.run is not None:
        recipe = read_recipe(source.run)
        return recipe.model.name, recipe.model.revision
    return (source.name if models.forms.description_of(model) is None else None), source.revision


def _is_hub_id(name: str) -> bool:
    place = models.locate(name)
    return not place.gguf and not Path(place.source).is_dir()


def licence_of(name: str, revision: str | None = None) -> Licence:
    """What a model says of its own licence, in its card, its GGUF metadata, or a file; nothing is guessed."""
    place = models.locate(name)
    if place.gguf:
        found = field_of(models.gguf_reader(Path(place.source) / place.options["gguf_file"]), "general.license")
        return Licence({} if found is None else {"license": str(found)})
    get = functools.partial(cached_file, place.source, revision=revision, _raise_exceptions_for_missing_entries=False)
    texts = [Path(path) for path in map(get, _LICENCES) if path is not None]
    card = get(FILE)
    head: dict[str, Any] = {} if card is None else ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    fields = {key: head[key] for key in _FIELDS if isinstance(head.get(key), str)}
    if not fields and texts:
        fields = {"license": "other", "license_link": texts[0].name}
    return Licence(fields, texts)


def _said(licence: Licence, base: str | None) -> str:
    if not licence.fields:
        return "Unknown: the base model says nothing of it here. Find out before you pass this model on."
    name = licence.fields.get("license_name", licence.fields.get("license", ""))
    named = f"That of {base}: {name}" if name != "other" else f"That of {base}"
    return f"{named}{f'; its text is in {licence.texts[0].name}' if licence.texts else ''}."


def _removed(model: PreTrainedModel) -> list[str]:
    """What is gone of the MLPs, and of the whole model."""
    described = models.forms.description_of(model)
    if described is None:
        return ["nothing was removed"]
    dense, here = described.dense, models.num_parameters(model)
    lines = [f"form {described.form}: {models.forms.describe(model)['compressed']}"]
    if here == dense.model:
        return [*lines, f"all {here:,} parameters are stored, zeros too"]
    left = models.mlp_parameters(model)
    return [
        *lines,
        f"MLPs: {left:,} of {dense.mlp:,} parameters are left, {1 - left / dense.mlp:.1%} are removed",
        f"whole model: {here:,} of {dense.model:,} parameters are left, {1 - here / dense.model:.1%} are removed",
    ]


def _perplexities(source: Source) -> list[list[str]]:
    """Rows of text, tokens, dense and this model, from the evaluation of the run's last round, if it is finished."""
    if source.run is None:
        return []
    summary = read_summary(source.run / planned(read_recipe(source.run))[-1].evaluation, needs_model=False)
    found = {} if summary is None else summary.get("models", {})
    if not {"dense", "distilled"} <= found.keys():
        return []
    return [
        [text, f"{one['num_tokens']:,}", _with_error(found["dense"][text]), _with_error(one)]
        for text, one in found["distilled"].items()
    ]


def _with_error(measured: Record) -> str:
    error = measured.get("standard_error")
    return f"{measured['perplexity']:.2f}" + ("" if error is None else f" +- {error:.2f}")


def _checked(record: Record) -> str:
    found = record["comparison"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return (
        f"Format {record['format']}, weights {record['weights']}; opened with {versions} and compared with the model "
        f"in PyTorch in float32 on {found['tokens']:,} tokens: logits differ by at most "
        f"{found['largest_logit_difference']:.2g}, the likeliest token is the same at {found['agreement']:.2%} of the "
        f"positions, perplexity is {found['perplexity']:.4f} instead of {found['reference_perplexity']:.4f}."
    )
