"""What the rounds of a recipe are: where each starts and who teaches it."""

from pathlib import Path

import pytest

from sparsekd.corpus.blocks import ALL
from sparsekd.errors import UsageError
from sparsekd.recipe import load_recipe
from sparsekd.run import folders_of
from sparsekd.run.rounds import Round, planned


def rounds(*overrides: str) -> list[Round]:
    return planned(load_recipe("demo", overrides))


def test_without_rounds_there_is_one_of_the_recipes_reduction() -> None:
    [only] = rounds("compress.reduction=0.25")
    assert (only.name, only.start, only.teachers) == ("round-01", "smollm2-135m", {"smollm2-135m": 1.0})
    assert only.compress is not None and only.compress.reduction == 0.25
    assert folders_of(only) == {
        "cache": "round-01/cache",
        "compress": "round-01/compressed",
        "distill": "round-01/distilled",
        "evaluate": "round-01/eval",
    }


def test_a_round_prunes_the_one_before_further_and_keeps_the_first_teacher() -> None:
    first, second, third = rounds("rounds=[0.15,0.35,0.65]")
    assert [one.compress.reduction for one in (first, second, third) if one.compress] == [0.15, 0.35, 0.65]
    assert [one.start for one in (first, second, third)] == ["smollm2-135m", first.distilled, second.distilled]
    assert first.teachers == second.teachers == third.teachers == {"smollm2-135m": 1.0}
    assert first.cache == second.cache == third.cache == "round-01/cache"


def test_with_recache_the_round_before_teaches() -> None:
    first, second, third = rounds("rounds=[0.15,0.35,0.65]", "teacher.recache=true")
    assert second.teachers == {first.distilled: 1.0} and second.cache == "round-02/cache"
    assert third.teachers == {second.distilled: 1.0} and third.cache == "round-03/cache"


def test_a_cascade_distils_the_dense_model_first_and_the_newest_generation_teaches() -> None:
    first, second, pruned = rounds("teacher.cascade=2", "teacher.anchor=0.25")
    assert [one.name for one in (first, second, pruned)] == ["generation-01", "generation-02", "round-01"]
    assert first.compress is None and second.compress is None and first.compressed is None
    assert {one.start for one in (first, second, pruned)} == {"smollm2-135m"}
    assert first.teachers == {"smollm2-135m": 1.0}
    assert second.teachers == {"smollm2-135m": 0.25, first.distilled: 0.75}
    assert pruned.teachers == {"smollm2-135m": 0.25, second.distilled: 0.75}
    assert len({first.cache, second.cache, pruned.cache}) == 3


def test_other_models_teach_with_weights_and_stay_the_anchor() -> None:
    models = "teacher.models={big: 3, smollm2-135m: 1}"
    assert rounds(models)[0].teachers == {"big": 3.0, "smollm2-135m": 1.0}
    _, second = rounds(models, "rounds=[0.2,0.4]", "teacher.recache=true", "teacher.anchor=0.4")
    assert second.teachers == {
        "big": pytest.approx(0.3),
        "smollm2-135m": pytest.approx(0.1),
        Path("round-01/distilled"): pytest.approx(0.6),
    }


def test_rounds_and_generations_divide_the_corpus_if_asked() -> None:
    assert {one.share for one in rounds("rounds=[0.2,0.4]", "teacher.cascade=1")} == {ALL}
    divided = rounds("rounds=[0.2,0.4]", "teacher.cascade=1", "split_corpus=true")
    assert [(one.name, str(one.share)) for one in divided] == [
        ("generation-01", "1/3"),
        ("round-01", "2/3"),
        ("round-02", "3/3"),
    ]
    assert [one.share for one in rounds("split_corpus=true")] == [ALL]
    with pytest.raises(UsageError, match="split_corpus is True: expected false, or corpus"):
        rounds("rounds=[0.2,0.4]", "split_corpus=true", "corpus.num_blocks=1")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rounds=[0.3,0.2]", r"rounds is 0.2: expected above 0.3, the round before, and at most 0.95"),
        ("rounds=[0]", "rounds is 0.0: expected above 0"),
        ("rounds=[0.5,1]", "at most 0.95"),
        ("rounds=0.5", "rounds is 0.5: expected a list"),
        ("teacher.cascade=-1", "teacher.cascade is -1: expected >= 0"),
        ("teacher.anchor=1", r"teacher.anchor is 1.0: expected \[0, 1\)"),
        (
            "teacher.mixture=geometric",
            "teacher.mixture is geometric: expected arithmetic, unless teacher.models has sever",
        ),
        ("teacher.mixture=harmonic", "teacher.mixture is 'harmonic': expected one of arithmetic, geometric"),
        ("teacher.models={a: 0}", "teacher.models.a is 0.0: expected > 0"),
    ],
)
def test_values_out_of_range(override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        rounds(override)
