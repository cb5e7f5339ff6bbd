"""What each step of the method `neurons` gives, before any training.

    python benchmarks/neurons_steps.py --data DIR [--reduction 0.35] [--blocks 120]

DIR is the folder that recipes/local-mixture.yaml describes. The order of the neurons and their widths are worked out
once; the arms differ in what the kept ones then do:

    sliced              nothing: the removed ones are left out
    correction 0, ...   they are fitted on the inputs of the narrowed model, and take over this share of what its
                        residual stream lacks; 0.5 is what the product does

Perplexity to the dense model's: on validation text, by which steps are chosen, and on the texts of the recipe.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
from _record import record
from torch import Tensor
from transformers import PreTrainedModel

from sparsekd import corpus, models
from sparsekd.compression import Batch, Calibration, batches_of, narrowing, plan_for
from sparsekd.evaluate import measure
from sparsekd.models import MLP
from sparsekd.models.forms import width
from sparsekd.recipe import load_recipe

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "reproduce-smollm2.yaml"
TEXTS = ("wikitext2", "c4", "stories")
VALIDATION = "wikitext2-raw/valid.txt"  # of DIR


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--reduction", type=float, default=0.35)
    parser.add_argument("--blocks", type=int, default=120)
    given = parser.parse_args()
    settings = (f"corpus.root={given.data}", "corpus.seq_len=512", f"corpus.num_blocks={given.blocks}")
    cut = ("compress.method=neurons", f"compress.reduction={given.reduction}")
    recipe = load_recipe(str(RECIPE), (*settings, *cut))
    model, tokenizer = models.load()
    built = corpus.build(recipe.corpus, recipe.evaluate.texts, tokenizer, recipe.seed)
    blocks = torch.tensor([built.tokens([i])[0].tolist() for i in built.order(recipe.seed, 0).tolist()])
    texts = {"validation": (Path(given.data) / VALIDATION).read_text(encoding="utf-8")}
    texts |= {name: built.texts[name] for name in TEXTS}

    def perplexities(one: PreTrainedModel) -> dict[str, float]:
        found = {name: measure({"it": one}, tokenizer, text, max_tokens=4096)["it"] for name, text in texts.items()}
        return {name: value.perplexity.perplexity for name, value in found.items()}

    dense = perplexities(model)
    batches = batches_of(blocks, 4)
    start = time.monotonic()
    removals = narrowing.removals_of(model, Calibration(model, batches, seed=recipe.seed))
    seconds = {"order": time.monotonic() - start}
    multiple = recipe.compress.options.multiple
    plan = narrowing.divided(model, plan_for(model, recipe.compress), removals, multiple)["global"]
    neurons = {line.name: line.neurons or 0 for line in plan.matrices}
    kept = {mlp: found.kept(neurons[mlp.output]) for mlp, found in removals.items()}
    arms: dict[str, dict[str, float]] = {}
    for name in ("sliced", "correction 0", "correction 0.5", "correction 1"):
        start = time.monotonic()
        narrowed = copy.deepcopy(model)
        width.keep(narrowed, kept, outputs_of(name, narrowed, kept, batches), {})
        seconds[name] = time.monotonic() - start
        arms[name] = {text: value / dense[text] for text, value in perplexities(narrowed).items()}
        print(name, arms[name], flush=True)
    figures = {"reduction": given.reduction, "tokens": blocks.numel(), "predicted_kl": plan.predicted_kl}
    record(f"neurons_steps_{given.reduction:g}", figures | {"dense": dense, "seconds": seconds, "arms": arms})


def outputs_of(name: str, model: PreTrainedModel, kept: dict[MLP, Tensor], batches: list[Batch]) -> dict[MLP, Tensor]:
    """The output matrices of an arm."""
    if name == "sliced":
        return {mlp: models.linear_weight(model.get_submodule(mlp.output))[:, one] for mlp, one in kept.items()}
    walk = Calibration(model, batches).walk()  # of the model whose columns it sees go, not of the dense one beside it
    return narrowing.compensated(model, kept, walk, correction=float(name.split()[1]))[0]


if __name__ == "__main__":
    main()
