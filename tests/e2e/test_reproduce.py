"""The paper's experiments on tiny real models: what runs, what is shared, what is compared."""

import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from sparsekd import errors
from sparsekd.recipe import load_recipe, method_names
from sparsekd.report import experiments
from sparsekd.reproduce import methods, plan_arms, reproduce
from sparsekd.run import inspection

ROOT = Path(__file__).parents[2]
ROUNDS = "rounds=[0.3,0.5]"


def run(experiment: str, recipe: Path, folder: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    options = {"seeds": [1, 2], "rates": [1e-4, 1e-3]} | options
    return reproduce(experiment, load_recipe(str(recipe), (ROUNDS, *overrides)), folder, **options)


def cells(found: dict[str, Any]) -> dict[str, list[list[str]]]:
    return {table.title: table.rows for table in experiments.all_tables(found)}


def test_rounds_over_seeds_against_the_control(tiny_recipe: Path, tmp_path: Path) -> None:
    found = run("III", tiny_recipe, tmp_path / "run")
    assert found == json.loads((tmp_path / "run/reproduce-III.json").read_text())
    assert list(found["arms"]) == ["Dense+KD", "Dense+KD equal tokens", "round 30%", "round 50%"]
    tokens = {name: by_seed["1"]["tokens"] for name, by_seed in found["arms"].items()}
    assert tokens["Dense+KD equal tokens"] == tokens["round 30%"] + tokens["round 50%"] == 2 * tokens["Dense+KD"]
    assert found["patterns"][-1]["reference"] == "Dense+KD equal tokens, distilled"
    for arm in found["arms"].values():
        assert set(arm) == {"1", "2"} and arm["1"]["learning_rate"] == arm["2"]["learning_rate"] in (1e-4, 1e-3)
        assert arm["1"]["models"]["distilled"] != arm["2"]["models"]["distilled"]  # another order of the data
    dense, long, first, second = (arm["1"]["mlp_reduction"] for arm in found["arms"].values())
    assert dense == long == 0 and 0.3 <= first < 0.4 and 0.5 <= second < 0.6
    assert "before" not in found["ratios"]["Dense+KD"]["held"] and "before" in found["ratios"]["round 30%"]["held"]
    one, two = (found["arms"]["round 30%"][seed]["models"] for seed in ("1", "2"))
    nats = [math.log(m["distilled"]["held"]["perplexity"] / m["dense"]["held"]["perplexity"]) for m in (one, two)]
    after = found["ratios"]["round 30%"]["held"]["after"]
    assert after["nats"] == pytest.approx(sum(nats) / 2)
    assert after["deviation"] == pytest.approx(abs(nats[0] - nats[1]) / math.sqrt(2))
    assert after["interval"][0] < after["ratio"] < after["interval"][1]
    assert {pattern["verdict"] for pattern in found["patterns"]} <= {"holds", "does not hold", "not decided"}
    distributions = {row[0]: row[2:] for row in cells(found)["Distance to the dense model, and calibration"]}
    kl = [m["distilled"]["held"]["agreement"]["kl"]["value"] for m in (one, two)]
    spread = abs(kl[0] - kl[1]) / math.sqrt(2)
    assert distributions["round 30%"][0] == f"{sum(kl) / 2:.3f} \u00b1 {spread:.3f}"
    assert distributions["dense"][:2] == ["", ""] and "\u00b1" in distributions["round 30%, pruned"][0]


def test_with_a_split_corpus_the_control_learns_from_all_parts(tiny_recipe: Path, tmp_path: Path) -> None:
    found = run("III", tiny_recipe, tmp_path / "run", "split_corpus=true", seeds=[1], rates=[1e-4])
    tokens = {name: by_seed["1"]["tokens"] for name, by_seed in found["arms"].items()}
    assert tokens["Dense+KD"] == tokens["round 30%"] + tokens["round 50%"] and tokens["round 50%"] > 0
    assert found["tokens"] == tokens["round 50%"]


def test_experiments_share_a_directory_and_its_arms(tiny_recipe: Path, tmp_path: Path) -> None:
    first = run("III", tiny_recipe, tmp_path / "run", seeds=[1], rates=[1e-3])
    assert not list((tmp_path / "run/arms").rglob("search"))  # one rate needs none
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "run/arms").rglob("model.safetensors")}
    found = run("IV", tiny_recipe, tmp_path / "run", seeds=[1], rates=[1e-3])
    assert all(path.stat().st_mtime_ns == time for path, time in made.items())
    assert {name: found["arms"][name] for name in first["arms"]} == first["arms"]
    swapped = tmp_path / "run/arms/round-50-better-teacher/seed-1"
    assert not (swapped / "compressed").exists()  # it is the last round's
    teacher = json.loads((swapped / "distilled/inputs.json").read_text())["teacher"]["teachers"]
    assert [one["folder"] for one in teacher] == ["arms/Dense+KD/seed-1/distilled"]
    [claim] = {pattern["claim"] for pattern in found["patterns"]}
    assert claim == "a better teacher makes a better student"


def test_finished_arms_need_no_weights(tiny_recipe: Path, tmp_path: Path) -> None:
    """What is kept of a long experiment between machines is its JSON; only the arms that are missing run."""
    out = tmp_path / "run"
    first = run("III", tiny_recipe, out, seeds=[1])
    facts = inspection.describe(out)
    assert facts["kind"] == "reproduction" and facts["experiments"] == "III"
    assert facts["arms/round-50/seed-1/distilled"] == facts["corpus"] == "finished"
    assert inspection.verify(out)["coverage"] == 1
    for path in (out / "arms").rglob("*"):
        if path.is_file() and path.suffix != ".json":
            path.unlink()
    shutil.rmtree(out / "corpus")
    again = run("III", tiny_recipe, out, seeds=[1, 2])
    for name, arm in first["arms"].items():
        assert again["arms"][name]["1"] == arm["1"] and set(again["arms"][name]) == {"1", "2"}
    assert not list((out / "arms/round-30/seed-1").rglob("model.safetensors"))


def test_one_seed_has_no_deviation(tiny_recipe: Path, tmp_path: Path) -> None:
    found = run("VI", tiny_recipe, tmp_path / "run", seeds=[1])
    assert list(found["arms"]) == ["Dense+KD", "tiered SVD 10.32%", "one shot 10.32%"]
    assert found["ratios"]["Dense+KD"]["held"]["after"]["deviation"] is None
    ratios, claims, distributions = cells(found).values()
    assert not any("\u00b1" in cell for row in [*ratios, *claims, *distributions] for cell in row)
    assert [row[-1] for row in ratios if row[0] == "tiered SVD 10.32%"] == ["0.43", "0.43"]  # 7.54 / 17.53


def test_controls_attribute_the_change(tiny_recipe: Path, tmp_path: Path) -> None:
    found = run("controls", tiny_recipe, tmp_path / "run", "rounds=[0.35]", seeds=[1])
    arms = found["arms"]
    assert arms["dense KL T1"]["1"]["first_grad_norm"] < 0.01 * arms["dense CE"]["1"]["first_grad_norm"]
    factors = {(row["cause"], row["text"]): row["nats"] for row in found["attribution"]}
    for text in found["texts"]:
        before, after = (factors[cause, text] for cause in ("pruning, before training", "training the pruned model"))
        shot = found["ratios"]["one shot 35%"][text]["after"]["nats"]
        assert before + after == pytest.approx(shot)
    assert "before" not in found["ratios"]["pruned CE"]["held"]


def test_a_long_run_gives_a_recovery_curve(tiny_recipe: Path, tmp_path: Path) -> None:
    found = run("recovery", tiny_recipe, tmp_path / "run", "distill.epochs=2", "distill.validations=4", seeds=[1])
    curve = found["recovery"]
    assert curve["tokens"] == [12 * 32 * 2 * part // 4 for part in (1, 2, 3, 4)]
    assert len(curve["gaps"]) == 4 and set(curve["tokens_for"]) == {"1.05", "1.2", "1.6"}
    assert "Tokens that the recovery curve asks for" in cells(found)
    run_on = curve["tokens"][-1]
    for asked, told in ((None, "never"), (2 * run_on, "(2 times those"), (101 * run_on, "over 100 times")):
        curve["tokens_for"] = {"1.05": asked}
        [[_, budget]] = cells(found)["Tokens that the recovery curve asks for"]
        assert told in budget


def test_two_protocols_and_the_harness(tiny_recipe: Path, tmp_path: Path) -> None:
    path = tmp_path / "wikitext2-raw" / "test.txt"
    path.parent.mkdir()
    path.write_text(" = River = \n \n The quiet river passes under the old bridge . \n" * 3)
    found = run("II", tiny_recipe, tmp_path / "run", "evaluate.tasks=[local_wikitext]", seeds=[1])
    rows = cells(found)["By protocol"]
    names = ["dense", *found["arms"]]
    assert [row[0] for row in rows if row[1] == "held"] == names
    harness = [row for row in rows if row[1].startswith("local_wikitext, word_perplexity")]
    assert [row[0] for row in harness] == names and len({row[2] for row in harness}) == len(names)


@pytest.mark.parametrize(
    ("experiment", "overrides", "options", "message"),
    [
        (
            "IX",
            (),
            {},
            "experiment IX: expected one of II, III, IV, V, VI, VII, VIII, X, methods, controls, recovery, svd",
        ),
        ("VII", (), {}, "experiment VII measures speed and trains nothing: leave --seeds and --rates out"),
        ("X", (), {"seeds": None}, "experiment X measures speed and trains nothing"),
        ("III", (), {"seeds": []}, r"seeds are \[\]"),
        ("III", (), {"rates": [1e-4, 0.0]}, r"distill.learning_rate is 0.0: expected \(0, 1\]"),
        ("V", ("distill.train=lora",), {}, "distill.train is lora"),
        ("III", (), {"seeds": [1, 1]}, r"seeds are \[1, 1\]: expected one or several different numbers"),
        ("III", ("evaluate.texts.held=null", "evaluate.texts.other=null"), {}, "evaluate.texts is empty"),
        ("III", ("teacher.cascade=1",), {}, "teacher: the experiments choose their teachers"),
        ("III", (), {"only": ["neurons"]}, "experiment III has no methods to choose from: leave --only out"),
        ("methods", (), {"only": ["neurons", "obd"]}, "--only has obd: expected methods among activation, .*whitened"),
    ],
)
def test_bad_input(
    experiment: str, overrides: tuple[str, ...], options: Any, message: str, tiny_recipe: Path, tmp_path: Path
) -> None:
    with pytest.raises(errors.UsageError, match=message):
        run(experiment, tiny_recipe, tmp_path / "run", *overrides, **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("shipped", "architecture", "experiment"),
    [
        ("reproduce-qwen3-0.6b", "qwen3", "IV"),
        ("reproduce-qwen3-0.6b", "qwen3", "V"),  # whose arms have no ranks to be multiples of anything
        ("reproduce-phi4-mini", "phi3", "VI"),
    ],
)
def test_the_recipes_for_gpus_on_tiny_models_of_their_architectures(
    shipped: str, architecture: str, experiment: str, tiny_recipe: Path, model_folder: Any, tmp_path: Path
) -> None:
    tiny = load_recipe(str(tiny_recipe))
    recipe = load_recipe(str(ROOT / "recipes" / f"{shipped}.yaml"), (f"model.name={model_folder(architecture)}",))
    recipe = replace(
        recipe,
        rounds=[0.3, 0.5],
        corpus=tiny.corpus,
        cache=tiny.cache,
        evaluate=tiny.evaluate,
        compress=replace(recipe.compress.by(recipe.compress.method, rank_multiple=2), num_tokens=384),
        distill=replace(recipe.distill, batch_size=2, micro_batch_size=1, validations=8, patience=1),
    )
    found = reproduce(experiment, recipe, tmp_path / "run", seeds=[1], rates=[1e-3])
    assert all(arm["1"]["tokens"] > 0 and arm["1"]["stop_reason"] for arm in found["arms"].values())
    ranks = json.loads(next((tmp_path / "run/arms").glob("*/seed-1/compressed/stage.json")).read_text())["matrices"]
    assert all(matrix["rank"] is None or matrix["rank"] % 2 == 0 for matrix in ranks)


def test_methods_are_compared_at_several_reductions(tiny_recipe: Path) -> None:
    (arms,) = plan_arms("methods", load_recipe(str(tiny_recipe), (ROUNDS,)), [1], [1e-3]).values()
    assert {f"{name} {reduction}%" for name in method_names() for reduction in (30, 50)} < arms.keys()
    assert all(arm.start == arms["Dense+KD"].start for arm in arms.values())  # each is a cut of the dense model


def test_other_forms_than_low_rank_train_alike_what_the_recipe_does_not_freeze(tiny_recipe: Path) -> None:
    scales = ("distill.lr_scale.attention=5", "distill.lr_scale.embeddings=0")
    (arms,) = plan_arms("methods", load_recipe(str(tiny_recipe), (*scales, ROUNDS)), [1], [1e-3]).values()
    assert asdict(arms["two-sided 30%"].distill.lr_scale) == {"attention": 5, "norms": 1, "embeddings": 0}
    assert asdict(arms["neurons 30%"].distill.lr_scale) == {"attention": 1, "norms": 1, "embeddings": 0}
    assert asdict(arms["Born-Again"].distill.lr_scale) == {"attention": 1, "norms": 1, "embeddings": 1}


def test_chosen_methods_with_the_control(tiny_recipe: Path, tmp_path: Path) -> None:
    options = {"only": ["wanda", "magnitude"], "rates": [1e-3]}
    found = run("methods", tiny_recipe, tmp_path / "run", "compress.num_tokens=256", **options)
    names = ["wanda 30%", "magnitude 30%", "wanda 50%", "magnitude 50%"]
    assert list(found["arms"]) == ["Dense+KD", *names]
    assert all(len(by_seed) == 2 for by_seed in found["arms"].values())  # both lead
    assert {pattern["model"].split(",")[0] for pattern in found["patterns"]} == set(names)
    assert "Perplexity by method" in (tmp_path / "run" / "reproduce-methods.html").read_text()


def test_every_method_in_one_table(tiny_recipe: Path, make_model: Any, tmp_path: Path) -> None:
    make_model("llama", num_hidden_layers=4).save_pretrained(tmp_path / "llama")
    widths = [f"compress.{name}.multiple=2" for name in ("neurons", "taylor", "activation", "slicegpt")]
    options = ("rounds=[0.5]", "compress.leave-out.probe_tokens=64", "compress.num_tokens=256", *widths)
    found = run("methods", tiny_recipe, tmp_path / "run", *options, rates=[1e-3])
    several = {name for name, by_seed in found["arms"].items() if len(by_seed) == 2}
    assert len(several) == 1 + methods.LEADING and "Dense+KD" in several
    table = next(rows for title, rows in cells(found).items() if title.startswith("Every method"))
    by_arm = {row[0]: row for row in table}
    assert by_arm.keys() == found["arms"].keys() >= {f"{name} 50%" for name in method_names()} | {"Born-Again"}
    assert by_arm["shortgpt 50%"][-1] == "transformers, gguf, onnx, openvino"
    assert by_arm["neurons 50%"][-1] == "gguf, hf, onnx, openvino" and by_arm["slicegpt 50%"][-1] == "onnx, openvino"
    assert by_arm["Dense+KD"][1] == "0.0%" and by_arm["wanda 50%"][1] == "50.0%"
    parameters = {name: int(row[3].replace(",", "")) for name, row in by_arm.items()}
    assert parameters["shortgpt 50%"] < parameters["taylor 50%"] < parameters["wanda 50%"] == parameters["Dense+KD"]
    losses = {
        name: sum(math.log(text["perplexity"]) for text in by_seed["1"]["models"]["distilled"].values())
        for name, by_seed in found["arms"].items()
        if name.endswith(" 50%")
    }
    assert several - {"Dense+KD"} == set(sorted(losses, key=lambda name: losses[name])[: methods.LEADING])
    claims = {pattern["claim"] for pattern in found["patterns"]}
    assert "SparseGPT recovers strongly (within 5 % of dense)" in claims
