"""The shipped mixture on the real text files, where they are at hand."""

from pathlib import Path
from typing import Any

import pytest

from sparsekd import corpus
from sparsekd.recipe import load_recipe

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"


@pytest.mark.skipif(not DATA.exists(), reason="the text files are not here")
def test_mixture_of_real_text(tokenizer: Any) -> None:
    overrides = (f"corpus.root={DATA}", "corpus.num_blocks=40", "corpus.num_validation_blocks=8")
    recipe = load_recipe(str(ROOT / "recipes" / "local-mixture.yaml"), overrides)
    built = corpus.build(recipe.corpus, recipe.evaluate.texts, tokenizer, seed=42)
    drawn = {name: report.drawn for name, report in built.reports.items()}
    assert drawn == {"c4": 12, "wikitext": 10, "gsm8k": 10, "code": 8}
    assert built.texts["wikitext2"].startswith("\n\n = Robert Boulter = \n\n\n\n\n")  # as the Hub's rows are joined
    assert built.reports["wikitext"].leaked_sequences == 0  # as its README says was checked
    assert built.reports["c4"].documents == 850  # the last 15 % of 1,000 are held out
