"""Several rounds, and teachers other than the dense model, on tiny real models."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsekd
from sparsekd import corpus, errors, models, pipeline
from sparsekd.recipe import Distill, inputs_of, load_recipe
from sparsekd.run import inspection
from sparsekd.run.reading import as_now, difference_of


def run(recipe: Path, folder: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    pipeline.run(load_recipe(str(recipe), overrides), folder, **options)
    return json.loads((folder / "report.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return sparsekd.load(str(folder / "model"))[0].state_dict()


def test_each_round_goes_on_from_the_one_before(tiny_recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    report = run(tiny_recipe, out, "rounds=[0.3,0.5,0.6]")
    reductions = [one["mlp_reduction"] for one in report["rounds"]]
    assert all(wanted <= found < wanted + 0.1 for wanted, found in zip((0.3, 0.5, 0.6), reductions, strict=True))
    assert report["compression"]["mlp_reduction"] == reductions[-1]
    assert report["model_folder"] == "round-03/distilled/model"
    assert [path.name for path in sorted(out.glob("round-*/cache"))] == ["cache"]  # the first teacher stays
    made_from = json.loads((out / "round-02/compressed/inputs.json").read_text())["model"]
    assert made_from["folder"] == "round-01/distilled"
    before, after = weights(out / "round-01/distilled"), weights(out / "round-02/compressed")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(before[name], after[name])  # attention as the first round trained it
    page = (out / "report.html").read_text()
    assert "Round by round" in page and "round-02" in page and "<script" not in page
    assert set(inspection.describe(out)) >= {"round-01/cache", "round-03/eval"}


def test_with_a_split_corpus_each_round_learns_from_its_own_part(tiny_recipe: Path, tmp_path: Path) -> None:
    asked = ("rounds=[0.3,0.5]", "split_corpus=true", "compress.method=two-sided", "compress.probe_tokens=16")
    out = tmp_path / "run"
    report = run(tiny_recipe, out, *asked)
    blocks = corpus.load(out / "corpus")
    for number in (1, 2):
        place = out / f"round-0{number}"
        for stage in ("compressed", "distilled"):
            assert json.loads((place / stage / "inputs.json").read_text())["share"] == f"{number}/2"
        history = json.loads((place / "distilled/stage.json").read_text())
        assert history["steps"][-1]["num_tokens"] == blocks.num_tokens // 2
    assert len(report["rounds"]) == 2


def test_a_later_round_s_probe_measures_from_the_model_as_it_is(tiny_recipe: Path, tmp_path: Path) -> None:
    """Else the distance that training left to the first teacher would count as damage of every single cut."""
    probe = ("compress.method=two-sided", "compress.allocation=global", "compress.probe_tokens=64")
    report = run(tiny_recipe, tmp_path / "run", "rounds=[0.3,0.5]", "distill.learning_rate=0.01", *probe)
    kl = report["rounds"][0]["models"]["distilled"]["held"]["agreement"]["kl"]["value"]
    assert kl > 0.01 and max(matrix["probed_kl"] for matrix in report["compression"]["matrices"]) < 0.0005


def test_a_round_can_be_the_start_of_another_run(tiny_recipe: Path, tmp_path: Path) -> None:
    run(tiny_recipe, tmp_path / "two", "rounds=[0.3,0.5]")
    start = tmp_path / "two/round-01/distilled/model"
    report = run(tiny_recipe, tmp_path / "on", f"model.name={start}", "compress.reduction=0.5")
    assert report["compression"]["mlp_parameters_after"] <= 0.5 * report["compression"]["mlp_parameters_before"]
    with pytest.raises(errors.UsageError, match="are removed already"):
        run(tiny_recipe, tmp_path / "less", f"model.name={start}", "compress.reduction=0.2")


def test_stopped_between_rounds_it_ends_with_the_same_bytes(tiny_recipe: Path, tmp_path: Path) -> None:
    rounds = "rounds=[0.3,0.5]"
    run(tiny_recipe, tmp_path / "straight", rounds)
    pipeline.run(load_recipe(str(tiny_recipe), (rounds,)), tmp_path / "steps", until="distill")
    assert not (tmp_path / "steps/round-02").exists()
    run(tiny_recipe, tmp_path / "steps", rounds, resume=True)
    for name in ("round-01", "round-02"):
        straight, steps = (
            tmp_path / f"{run}/{name}/distilled/model/model.safetensors" for run in ("straight", "steps")
        )
        assert straight.read_bytes() == steps.read_bytes()


def test_with_recache_and_anchor_the_round_before_teaches_beside_the_first(tiny_recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(tiny_recipe, out, "rounds=[0.3,0.5]", "teacher.recache=true", "teacher.anchor=0.25")
    first, second = (json.loads((out / f"round-0{n}/cache/stage.json").read_text())["identity"] for n in (1, 2))
    assert isinstance(first["teacher"], str)
    assert second["weights"] == [0.25, 0.75] and second["teacher"][0] == first["teacher"] != second["teacher"][1]


def test_generations_are_anchored_by_a_geometric_mixture(tiny_recipe: Path, tmp_path: Path) -> None:
    """The first has one teacher, so its cache is what it is without; who asks for the other mean is told."""
    out, asked = tmp_path / "run", ("teacher.cascade=1", "teacher.anchor=0.25", "teacher.mixture=geometric")
    run(tiny_recipe, out, *asked)
    first, second = (
        json.loads((out / f"{name}/cache/stage.json").read_text())["identity"] for name in ("generation-01", "round-01")
    )
    assert "mixture" not in first and isinstance(first["teacher"], str)
    assert second["mixture"] == "geometric" and second["weights"] == [0.25, 0.75]
    before = (out / "recipe.yaml").read_bytes()
    with pytest.raises(errors.MismatchError, match=r"round-01/cache holds another run: mixture is geometric there and"):
        run(tiny_recipe, out, *asked[:2], resume=True)
    assert (out / "recipe.yaml").read_bytes() == before


def test_a_cascade_teaches_with_the_distilled_dense_model(tiny_recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    report = run(tiny_recipe, out, "teacher.cascade=2")
    assert [one["name"] for one in report["rounds"]] == ["generation-01", "generation-02", "round-01"]
    assert [one["mlp_reduction"] > 0 for one in report["rounds"]] == [False, False, True]
    assert list(report["rounds"][1]["teachers"]) == ["generation-01/distilled"]
    dense, distilled = weights(out / "generation-01/distilled"), weights(out / "generation-02/distilled")
    assert dense.keys() == distilled.keys() and not all(torch.equal(dense[name], distilled[name]) for name in dense)


def test_generations_and_rounds_start_from_fresh_weights_of_their_own(tiny_recipe: Path, tmp_path: Path) -> None:
    """With a rate of next to nothing a student stays what it started as."""
    out, settings = tmp_path / "run", ("teacher.cascade=2", "distill.learning_rate=1e-12", "rounds=[0.3]")
    run(tiny_recipe, out, *settings, "distill.start=fresh")
    dense = sparsekd.load(str(tiny_recipe.parent / "llama"))[0].state_dict()
    found = [weights(out / name / "distilled") for name in ("generation-01", "generation-02", "round-01")]
    name = "model.layers.0.self_attn.q_proj.weight"
    for one, other in itertools.combinations([dense, *found], 2):
        assert not torch.allclose(one[name], other[name], atol=0.01)
    compressed = weights(out / "round-01/compressed")
    assert {key: value.shape for key, value in compressed.items()} == {k: value.shape for k, value in found[2].items()}
    assert torch.equal(compressed[name], dense[name])
    with pytest.raises(errors.MismatchError, match=r"distill.start is fresh there and weights now"):
        run(tiny_recipe, out, *settings)


@pytest.mark.parametrize(
    ("option", "before", "other"), [("start", "weights", "fresh"), ("schedule", "cosine", "linear")]
)
def test_inputs_from_before_there_was_an_option_are_read(option: str, before: str, other: str) -> None:
    now = inputs_of(Distill())
    assert now[option] == before
    earlier = {"distill": {key: value for key, value in now.items() if key != option}}
    assert difference_of(as_now(earlier), {"distill": now}) is None
    assert difference_of(as_now(earlier), {"distill": now | {option: other}}) is not None


@pytest.mark.parametrize("teacher", ["cache", "online"])
def test_a_larger_teacher_of_the_same_vocabulary(
    teacher: str, tiny_recipe: Path, model_folder: Any, tmp_path: Path
) -> None:
    larger = model_folder("qwen3")
    out = tmp_path / "run"
    run(tiny_recipe, out, f"teacher.models={{{larger}: 1}}", f"distill.teacher={teacher}")
    made_from = json.loads((out / "round-01/cache/inputs.json").read_text())
    assert [one["content"] for one in made_from["teachers"]] == [models.source_hash(str(larger))]


@pytest.mark.parametrize("teacher", ["cache", "online"])
def test_a_teacher_of_other_tokens_is_named_before_anything_starts(
    teacher: str, tiny_recipe: Path, model_folder: Any, gemma_like: Any, tmp_path: Path
) -> None:
    other = model_folder("qwen3")
    gemma_like.save_pretrained(other)
    with pytest.raises(errors.MismatchError, match=r"teacher .*qwen3: its tokenizer is not that of .*llama, whose tok"):
        run(tiny_recipe, tmp_path / "run", f"teacher.models={{{other}: 1}}", f"distill.teacher={teacher}")
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_is_not_there_is_named_before_anything_starts(tiny_recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.UsageError, match="no such folder"):
        run(tiny_recipe, tmp_path / "run", "teacher.models={/nowhere/at/all: 1}")
    assert not (tmp_path / "run").exists()
