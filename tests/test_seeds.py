"""Every seed that a recipe accepts works wherever one is used, and gives numbers of its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from sparsekd.compression import statistics
from sparsekd.corpus import build, shuffled
from sparsekd.recipe import Corpus, Source, load_recipe
from sparsekd.teacher import fill

PAIRS = [(2**53 - 1, 2**53 - 2), (2**52, 2**52 + 1), (-1, -2), (1 - 2**53, 2 - 2**53)]


@pytest.fixture(params=PAIRS, ids=str)
def seeds(request: Any) -> list[int]:
    """Two neighbours."""
    return [load_recipe("demo", (f"seed={seed}",)).seed for seed in request.param]


def draws(model: PreTrainedModel, folder: Path, seed: int) -> list[int]:
    """The tokens that are drawn from a flat teacher: 12 of 400 at each of 99 positions."""
    tokens = np.arange(100, dtype=np.int32)
    cache = fill(model, folder, {3: tokens}, tokenizer_hash="t", corpus_fingerprint="c", codec="sampled", seed=seed)
    assert cache is not None
    return cache.read(3, tokens).ids.flatten().tolist()


def test_a_seed_draws_the_cache(seeds: list[int], make_model: Callable[[str], PreTrainedModel], tmp_path: Path) -> None:
    one, other = (draws(make_model("llama"), tmp_path / str(seed), seed) for seed in seeds)
    assert one != other


def test_a_seed_cuts_and_orders_the_blocks(seeds: list[int], text_file: Path, tokenizer: Any) -> None:
    recipe = Corpus(
        root=str(text_file.parent), sources={"learn": Source(path=text_file.name)}, seq_len=32, num_blocks=40
    )
    one, other = (build(recipe, {}, tokenizer, seed) for seed in seeds)
    assert one.fingerprint != other.fingerprint
    assert list(one.order(seeds[0], 0)) != list(one.order(seeds[1], 0))


def test_a_seed_draws_the_labels_of_curvature(seeds: list[int], make_model: Callable[[str], PreTrainedModel]) -> None:
    model = make_model("llama")
    batches = list(torch.randint(0, 300, (4, 32), generator=torch.Generator().manual_seed(0)).split(2))

    def curvature(seed: int) -> torch.Tensor:
        moments = statistics.collect(model, batches, curvature=True, seed=seed)
        return torch.cat([gram.sum.flatten() for seen in moments.values() for gram in seen.grams()])

    one, other = map(curvature, seeds)
    assert not torch.equal(one, other)


def test_the_numbers_of_usual_seeds_stay(make_model: Callable[[str], PreTrainedModel], tmp_path: Path) -> None:
    assert shuffled(np.arange(8), 42, 1).tolist() == [5, 1, 4, 7, 3, 0, 2, 6]
    assert draws(make_model("llama"), tmp_path, 42)[:6] == [23, 57, 90, 123, 157, 190]
