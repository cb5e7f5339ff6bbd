"""What a recipe asks of any machine."""

from pathlib import Path

from sparsekd.recipe import load_recipe
from sparsekd.run.costs import costs_of, parts_of, trial_tokens


def test_of_several_steps_the_one_that_needs_most_memory_counts(tiny_recipe: Path) -> None:
    def held(compress: str) -> float:
        costs = costs_of(load_recipe(str(tiny_recipe), (f"compress={compress}",)))
        return parts_of(costs, 4, 4, 2, on_gpu=False)["compress"].total

    needy, plain = (f"{{method: {name}, reduction: 0.25, num_tokens: 256}}" for name in ("neurons", "magnitude"))
    assert held(f"[{needy}, {plain}]") == held(needy) > held(plain)


def test_a_rate_is_tried_on_a_quarter_of_an_epoch_or_on_65_536_tokens() -> None:
    assert trial_tokens(1000) == 250 and trial_tokens(1_200_128) == 65_536
