"""What a recipe may say: types, ranges, nearest names, overrides, presets, and no error but UsageError."""

import contextlib
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekd.corpus.blocks import Corpus
from sparsekd.errors import UsageError
from sparsekd.recipe import PRESETS, Recipe, Source, as_dict, as_yaml, load_recipe
from sparsekd.recipe.reading import merge

RECIPES = sorted((Path(__file__).parent.parent.parent / "recipes").glob("*.yaml"))


def load(folder: Path, text: str, *overrides: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(str(path), overrides)


def refused(folder: Path, text: str, *overrides: str) -> str:
    """The one line that says why."""
    with pytest.raises(UsageError) as caught:
        load(folder, text, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- types


def test_values_are_coerced_to_the_declared_types(tmp_path: Path) -> None:
    assert yaml.safe_load("1e-4") == "1e-4"  # what makes it necessary
    recipe = load(
        tmp_path, "preset: demo\nmodel: {name: 7}\ndistill: {learning_rate: 1e-4, epochs: 2.0, max_grad_norm: 1}"
    )
    assert recipe.distill.learning_rate == 1e-4
    assert recipe.model.name == "7"
    assert (recipe.distill.epochs, type(recipe.distill.epochs)) == (2, int)
    assert type(recipe.distill.max_grad_norm) is float


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("distill: {epochs: 1.5}", "distill.epochs is 1.5: expected int"),
        ("distill: {epochs: many}", "distill.epochs is 'many': expected int"),
        ("distill: {epochs: true}", "distill.epochs is True: expected int"),
        ("distill: {epochs: .inf}", "distill.epochs is inf: expected int"),
        ("distill: {alpha: [1]}", "distill.alpha is [1]: expected float"),
        ("distill: {alpha: null}", "distill.alpha is None: expected float"),
        ("corpus: {pack: 1}", "corpus.pack is 1: expected bool"),
        ("model: {name: true}", "model.name is True: expected str"),
        ("compress: {method: magic}", "compress.method is 'magic': expected one of "),
        ("compress: {method: [svd]}", "compress.method is ['svd']: expected str"),
        ("distill: 3", "distill must be a section, found 3"),
        ("corpus: {sources: [a]}", "corpus.sources must be a section, found ['a']"),
        ("corpus: {sources: {a: x.txt}}", "corpus.sources.a must be a section, found 'x.txt'"),
    ],
)
def test_a_wrong_type_is_named_with_the_place_and_what_was_expected(section: str, message: str, tmp_path: Path) -> None:
    assert message in refused(tmp_path, f"preset: demo\n{section}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("distil: {epochs: 1}", "unknown key 'distil': did you mean 'distill'?"),
        ("distill: {epoch: 1}", "unknown key 'distill.epoch': did you mean 'epochs'?"),
        ("corpus: {sources: {a: {pth: x}}}", "unknown key 'corpus.sources.a.pth': did you mean 'path'?"),
        ("cache: {zzzzzz: 1}", "unknown key 'cache.zzzzzz': known here: codec, top_k, blocks_per_shard, batch_size"),
        ("1: 2", "unknown key '1': known here: seed"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(text: str, message: str, tmp_path: Path) -> None:
    found = refused(tmp_path, text)
    assert message in found
    assert "recipe.yaml" in found


# ---- ranges


@pytest.mark.parametrize("value", ["0", "0.96", "-1", ".nan", "nan", ".inf", "1"])
def test_reduction_outside_its_range_is_refused(value: str, tmp_path: Path) -> None:
    found = refused(tmp_path, f"preset: demo\ncompress: {{reduction: {value}}}")
    assert "compress.reduction is" in found
    assert "(0, 0.95]" in found


@pytest.mark.parametrize("value", [0.001, 0.95])
def test_reduction_inside_its_range_is_taken(value: float, tmp_path: Path) -> None:
    assert load(tmp_path, f"preset: demo\ncompress: {{reduction: {value}}}").compress.reduction == value


@pytest.mark.parametrize(
    "override",
    [
        "corpus.seq_len=7",
        "corpus.num_blocks=0",
        "corpus.sources.python.weight=0",
        "corpus.sources.python.weight=.nan",
        "corpus.sources.python.weight=.inf",
        "corpus.sources.python.holdout=1",
        "cache.top_k=257",
        "cache.batch_size=0",
        "distill.learning_rate=nan",
        "distill.learning_rate=0",
        "distill.alpha=1.01",
        "distill.temperature=0",
        "distill.micro_batch_size=3",
        "distill.micro_batch_size=0",
        "evaluate.stride=513",
        "evaluate.max_tokens=1",
        "evaluate.max_tokens=0",
        "evaluate.task_limit=0",
        "seed=9007199254740992",  # 2^53: a whole number goes through a float, which skips some from there on
        "seed=-1e30",
        "distill.checkpoint_minutes=-1",
        "distill.lr_scale.norms=-1",
        "distill.lora_rank=0",
        "distill.patience=0",
        "distill.min_improvement=1",
        "distill.train=some",
        "distill.stop=never",
        "distill.teacher=oracle",
        "distill.precision=float8",
        "distill.trackers=tensorboard",
        "distill.batch_size=0",
        "distill.checkpoint_minutes=nan",
        "compress.two-sided.probe_tokens=-1",
        "compress.two-sided.rank_floor=1.5",
        "compress.two-sided.rank_cap=0",
        "compress.two-sided.rank_multiple=0",
    ],
)
def test_other_values_outside_their_ranges(override: str) -> None:
    name = override.partition("=")[0]
    with pytest.raises(UsageError, match=f"^(recipe: )?{name} is .*: expected"):
        load_recipe("demo", (override,))


def test_a_global_budget_needs_curvature_or_the_probe(tmp_path: Path) -> None:
    found = refused(tmp_path, "preset: demo", "compress.method=whitened", "compress.allocation=global")
    assert "compress.allocation is global" in found
    assert "two-sided or compress.probe_tokens above 0, found whitened and 0" in found
    load(tmp_path, "preset: demo", "compress={method: whitened, whitened: {allocation: global, probe_tokens: 2048}}")
    load(tmp_path, "preset: demo", "compress.method=whitened")


def test_each_method_has_its_own_section(tmp_path: Path) -> None:
    text = "preset: demo\ncompress: {svd: {format: lowrank}, two-sided: {rank_floor: 0.3}}"
    assert load(tmp_path, text).compress.method == "neurons"  # the preset's
    recipe = load(tmp_path, text, "compress.method=two-sided")
    assert (recipe.compress.options.rank_floor, recipe.compress.options.allocation) == (0.3, "uniform")
    other = load(tmp_path, text, "compress.method=svd")
    assert (other.compress.options.format, other.compress.options.rank_floor) == ("lowrank", 0.2)
    assert "two-sided.rank_floor" in refused(tmp_path, text, "compress.method=two-sided", "compress.rankfloor=0.1")
    assert "unknown key 'compress.svd.forma'" in refused(tmp_path, text, "compress.svd.forma=pivot")


def test_the_options_of_version_0_1_stand_beside_the_common_ones(tmp_path: Path) -> None:
    text = "preset: demo\ncompress: {method: svd, allocation: energy, format: lowrank, reduction: 0.2}"
    assert (
        load(tmp_path, text).compress
        == load(
            tmp_path,
            "preset: demo\ncompress: {method: svd, reduction: 0.2, svd: {allocation: energy, format: lowrank}}",
        ).compress
    )
    written = "compress: {method: wanda, allocation: uniform, format: mask, probe_tokens: 0, rank_floor: 0.2}"
    assert load(tmp_path, f"preset: demo\n{written}").compress.method == "wanda"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1", "corpus.sources is empty"),
        ("corpus: {sources: {a: {}}}", "exactly one of path, embedded, hub; found none"),
        ("corpus: {sources: {a: {path: a.txt, hub: b}}}", "found path and hub"),
        ("corpus: {sources: {a: {hub: b, holdout: 0.1}}}", "holdout works for files only"),
        ("corpus: {sources: {a: {path: a.txt}}}\nevaluate: {texts: {t: {}}}", "exactly one of path, holdout_of"),
        ("preset: demo\nevaluate: {tasks: piqa}", "evaluate.tasks is 'piqa': expected a list such as [a, b]"),
        ("preset: demo\nevaluate: {prompts: false}", "evaluate.prompts is False: expected a list such as [a, b]"),
        ("preset: demo\nevaluate: {prompts: [{a: b}]}", "evaluate.prompts is {'a': 'b'}: expected str"),
        ("preset: demo\nevaluate: {prompts: [a, ' ']}", "evaluate.prompts: number 2 is ' ': expected a text to go on"),
        ('preset: demo\nevaluate: {prompts: ["\\ud800"]}', "evaluate.prompts: number 1 is '\\ud800': expected a text"),
        ("preset: demo\nevaluate: {tasks: [[piqa]]}", "evaluate.tasks is ['piqa']: expected str"),
        (
            "corpus: {sources: {a: {path: a.txt}}}\nevaluate: {texts: {t: {holdout_of: a}}}",
            "no 'a' with a holdout above 0",
        ),
    ],
)
def test_places_that_text_comes_from(text: str, message: str, tmp_path: Path) -> None:
    assert message in refused(tmp_path, text)


@pytest.mark.parametrize("seed", [2**53 - 1, -1, 0])
def test_a_seed_is_kept_to_the_last_digit_and_orders_blocks(seed: int) -> None:
    kept = load_recipe("demo", (f"seed={seed}",)).seed
    assert kept == seed
    Corpus([], np.arange(5), np.arange(0), {}, "").order(kept, 0)


def bomb(brackets: str) -> str:
    """Each level of aliases is eight times the last: a file of 500 bytes stands for gigabytes."""
    levels = [brackets.replace("-", "x: 1") if brackets == "{-}" else "[x, x, x, x, x, x, x, x]"]
    for old in "abcdefghij":
        inside = ", ".join([f"*{old}"] * 8)
        levels.append(f"{{<<: [{inside}]}}" if brackets == "{-}" else f"[{inside}]")
    return f"[{', '.join(f'&{name} {level}' for name, level in zip('abcdefghijk', levels, strict=True))}]"


@pytest.mark.parametrize("brackets", ["[-]", "{-}"])
@pytest.mark.parametrize(
    "place", ["preset: {}", "seed: {}", "distill: {}", "corpus: {{sources: {}}}", "compress: {{method: {}}}", "x: {}"]
)
def test_aliases_are_refused_at_once(place: str, brackets: str, tmp_path: Path) -> None:
    start = time.monotonic()
    assert "aliases (*name)" in refused(tmp_path, place.format(bomb(brackets)))
    assert time.monotonic() - start < 5
    with pytest.raises(UsageError, match="aliases"):
        load_recipe("demo", (f"seed={bomb(brackets)}",))


@pytest.mark.parametrize("number", [":".join(["1"] * 5000), "0x" + "f" * 5000, "0b" + "1" * 20_000, "1" * 5000])
@pytest.mark.parametrize("place", ["seed: {}", "{}: 1", "evaluate: {{tasks: [{}]}}", "distill: {}", "preset: {}"])
def test_a_number_of_thousands_of_digits_is_one_line(place: str, number: str, tmp_path: Path) -> None:
    """As hexadecimal or in base 60 it is read, but Python does not show it."""
    assert len(refused(tmp_path, place.format(number))) < 2500


def test_a_recipe_of_a_hundred_kilobytes_is_refused_at_once(tmp_path: Path) -> None:
    start = time.monotonic()
    assert "characters are no recipe" in refused(tmp_path, "preset: demo\n" * 200_000)
    assert time.monotonic() - start < 5


def test_a_name_with_a_line_end_does_not_break_the_line(tmp_path: Path) -> None:
    refused(tmp_path, 'corpus: {sources: {"a\\nb": {path: x.txt, weight: 0}}}')


@pytest.mark.parametrize("name", ["x" * 100_000, "a\nb\x1b[2J"])
def test_a_message_is_one_line_of_bounded_length_whatever_it_names(name: str) -> None:
    for error in (UsageError(f"model {name}: no"), UsageError("no", name)):
        message = str(error)
        assert len(message) < 2100
        assert all(line.isprintable() for line in message.split("\n  "))


# ---- overrides and presets


def test_overrides_win_in_their_order_and_take_a_source_out(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        "preset: demo\ndistill: {epochs: 2}",
        "distill.epochs=3",
        "distill.epochs=4",
        "distill.learning_rate=1e-5",
        "corpus.sources.python=null",
        "evaluate.texts.python=null",
    )
    assert recipe.distill.epochs == 4
    assert recipe.distill.learning_rate == 1e-5
    assert list(recipe.corpus.sources) == ["wikipedia"]
    assert list(recipe.evaluate.texts) == ["wikipedia"]
    assert load_recipe("demo").corpus.sources.keys() == {"wikipedia", "python"}  # the preset is as it was


def test_a_source_may_be_added_and_a_whole_section_given() -> None:
    recipe = load_recipe("demo", ("corpus.sources.mine={path: a.txt, weight: 2}",))
    assert recipe.corpus.sources["mine"] == Source(path="a.txt", weight=2.0)
    assert len(recipe.corpus.sources) == 3


@pytest.mark.parametrize(
    "override", ["distill.epochs", "=3", "distill..epochs=3", "nothing=3", "distill.epochs=[", "distill=3"]
)
def test_an_override_that_cannot_be_read(override: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe("demo", (override,))
    assert "\n" not in str(caught.value)


def test_presets() -> None:
    assert set(PRESETS) == {"demo", "paper"}
    demo, paper = load_recipe("demo"), load_recipe("paper")
    assert {source.embedded for source in demo.corpus.sources.values()} == {"wikipedia", "python"}
    assert all(source.hub for source in paper.corpus.sources.values())
    shares = [source.weight for source in paper.corpus.sources.values()]
    assert shares == [0.30, 0.25, 0.25, 0.20]  # section IV-C of the paper
    assert (paper.corpus.num_blocks, paper.corpus.seq_len, paper.corpus.pack) == (50_000, 512, False)


def test_anything_else_is_a_model_for_the_demo() -> None:
    assert load_recipe("org/name") == dataclasses.replace(
        load_recipe("demo"), model=dataclasses.replace(load_recipe("demo").model, name="org/name")
    )


@pytest.mark.parametrize("preset", ["none", "[demo]", "3"])
def test_an_unknown_preset_is_named(preset: str, tmp_path: Path) -> None:
    assert "known are demo, paper" in refused(tmp_path, f"preset: {preset}")


def test_merge_modifies_neither_side() -> None:
    base, changes = {"a": {"b": 1, "c": 2}}, {"a": {"b": 3}, "d": {"e": 4}}
    assert merge(base, changes) == {"a": {"b": 3, "c": 2}, "d": {"e": 4}}
    assert base == {"a": {"b": 1, "c": 2}}
    assert changes == {"a": {"b": 3}, "d": {"e": 4}}


# ---- files


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_that_come_with_the_project_parse_and_survive_being_written(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(path))
    assert load(tmp_path, as_yaml(recipe)) == recipe


@pytest.mark.parametrize("preset", PRESETS)
def test_a_written_recipe_reads_back_equal(preset: str, tmp_path: Path) -> None:
    recipe = load_recipe(
        preset, ("corpus.sources.new={path: é.txt, text: '{a}\\n{b}', weight: 1e-7}", "model.revision='12'")
    )
    assert recipe.model.revision == "12"
    assert load(tmp_path, as_yaml(recipe)) == recipe
    assert Recipe(**{**vars(recipe), "seed": 1}) != recipe
    assert yaml.safe_load(as_yaml(recipe)) == as_dict(recipe)


@pytest.mark.parametrize(
    "text",
    [
        "seed: !!python/object/apply:os.system ['true']",
        "seed: !!python/object:sparsekd.recipe.Recipe {}",
        "a: [",
        "a: 1\n b: 2",
        "\t",
        "a: 2001-99-99",
        "a: !!int abc",
        "a: !!timestamp x",
        "a: " + "[" * 5000,
        "",
        "just words",
        "- a\n- b",
    ],
)
def test_what_is_not_a_recipe_is_a_usage_error(text: str, tmp_path: Path) -> None:
    assert "recipe.yaml" in refused(tmp_path, text)


def test_no_object_is_made_by_a_tag(tmp_path: Path) -> None:
    marker = tmp_path / "made"
    refused(
        tmp_path, f"seed: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{marker}']]"
    )
    assert not marker.exists()


def test_a_missing_file_a_folder_and_another_encoding(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.yaml cannot be read"):
        load_recipe(str(tmp_path / "none.yaml"))
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(UsageError, match=r"folder\.yaml cannot be read"):
        load_recipe(str(tmp_path / "folder.yaml"))
    (tmp_path / "latin.yaml").write_bytes("seed: é".encode("latin-1"))
    with pytest.raises(UsageError, match=r"latin\.yaml"):
        load_recipe(str(tmp_path / "latin.yaml"))


# ---- anything at all


def keys_of(kind: Any) -> list[str]:
    return [item.name for item in dataclasses.fields(kind)]


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["1e-4", "demo", "svd", "global", "nan", "x.txt", "wikipedia"]),
    st.dates(),
)
KEYS = st.one_of(
    st.sampled_from(sorted({"preset", *keys_of(Recipe), *keys_of(Source), "sources", "texts", "method", "alpha"})),
    st.text(max_size=4),
    st.integers(),
    st.none(),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
)
SECTIONS = {
    item.name: st.one_of(
        VALUES,
        st.dictionaries(st.sampled_from(keys_of(item.default_factory)), VALUES, max_size=3),
    )
    for item in dataclasses.fields(Recipe)
    if dataclasses.is_dataclass(item.default_factory)
} | {"rounds": VALUES}
MAPPINGS = st.one_of(
    st.dictionaries(KEYS, VALUES, max_size=4),
    st.fixed_dictionaries({}, optional={**SECTIONS, "preset": st.sampled_from(["demo", "paper"]) | VALUES}),
    st.fixed_dictionaries({"preset": st.just("demo")}, optional={"seed": VALUES, "distill": SECTIONS["distill"]}),
)


@settings(max_examples=300, deadline=None)
@given(MAPPINGS)
def test_any_mapping_gives_a_recipe_or_a_usage_error(mapping: dict[Any, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            recipe = load(Path(folder), yaml.safe_dump(mapping, allow_unicode=True))
        except UsageError:
            return
        assert isinstance(recipe, Recipe)
        assert load(Path(folder), as_yaml(recipe)) == recipe


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40) | st.text(max_size=40).map(lambda text: text.encode("utf-8", "replace")))
def test_any_bytes_give_a_recipe_or_a_usage_error(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_bytes(b"preset: demo\n" + content)
        with contextlib.suppress(UsageError):
            assert isinstance(load_recipe(str(path)), Recipe)
