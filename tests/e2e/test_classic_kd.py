"""A larger model teaches a smaller one of the same vocabulary, as docs/distill.md has it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import sharpened
from transformers import PreTrainedModel

from sparsekd import models, pipeline
from sparsekd.recipe import load_recipe
from sparsekd.run.rounds import planned

PAGE = Path(__file__).parents[2] / "docs" / "distill.md"


@pytest.mark.parametrize("teacher", ["cache", "online"])
def test_the_lines_of_the_page(
    teacher: str, tiny_recipe: Path, make_model: Callable[..., PreTrainedModel], tokenizer: Any, tmp_path: Path
) -> None:
    larger, smaller = tmp_path / "larger", tmp_path / "llama"
    sharpened(make_model("llama", hidden_size=64, intermediate_size=160, num_hidden_layers=3)).save_pretrained(larger)
    tokenizer.save_pretrained(larger)
    [lines] = re.findall(r"```yaml\n(model: \{name: SMALLER\}.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(lines.splitlines()) <= 3
    asked = yaml.safe_load(lines.replace("SMALLER", str(smaller)).replace("LARGER", str(larger)))
    recipe = yaml.safe_load(tiny_recipe.read_text())
    recipe["model"] |= asked["model"]
    recipe["distill"] |= {"teacher": teacher, "epochs": 6, "learning_rate": 5e-3, "alpha": 1.0}
    tiny_recipe.write_text(yaml.safe_dump(recipe | {"teacher": asked["teacher"]}))
    loaded = load_recipe(str(tiny_recipe))

    pipeline.run(loaded, tmp_path / "run", until="distill")
    first = planned(loaded)[0]
    assert first.name == "generation-01" and not (tmp_path / "run/round-01").exists()
    made_from = json.loads((tmp_path / "run/generation-01/cache/inputs.json").read_text())
    assert [one["content"] for one in made_from["teachers"]] == [models.source_hash(str(larger))]
    history = json.loads((tmp_path / "run/generation-01/distilled/stage.json").read_text())
    start, *_, end = history["validations"]
    assert end["kd"] < 0.8 * start["kd"]  # and the teacher is the larger one: of itself the student knows all
    trained, _ = models.load(str(tmp_path / "run/generation-01/distilled/model"))
    assert (trained.config.hidden_size, trained.config.num_hidden_layers) == (32, 2)
