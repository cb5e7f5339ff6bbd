"""Texts of few words, and a tiny model that has something to lose."""

import random

import torch
from transformers import PreTrainedModel

WORDS = [
    "river",
    "mountain",
    "silver",
    "quiet",
    "bright",
    "garden",
    "winter",
    "copper",
    "engine",
    "signal",
    "harbour",
    "letter",
    "window",
    "candle",
    "market",
    "bridge",
    "forest",
    "hammer",
    "island",
    "kettle",
    "lantern",
    "meadow",
    "needle",
    "orchard",
    "pepper",
    "quarry",
    "ribbon",
    "saddle",
    "temple",
    "umbrella",
    "valley",
    "walnut",
    "yellow",
    "zebra",
    "anchor",
    "basket",
    "cellar",
    "dragon",
    "ember",
    "falcon",
    "goblet",
    "hollow",
    "ivory",
    "jacket",
    "kernel",
    "ladder",
    "marble",
]


def paragraphs(count: int, seed: int) -> list[str]:
    """Distinct paragraphs of 20 to 60 words; no two share a long sequence of words."""
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(20, 60))).capitalize() + "." for _ in range(count)]


def compute_in_float32() -> None:
    """For processes of their own, which the fixture does not reach: as on a processor that is no faster in bfloat16."""
    torch.cpu._is_avx512_bf16_supported = lambda: False


def sharpened(model: PreTrainedModel) -> PreTrainedModel:
    """A random model made sure of itself, with MLPs that matter, so that there is something to lose and to restore."""
    from sparsekd.models.anatomy import find_mlps

    with torch.no_grad():
        for mlp in find_mlps(model):
            for name in mlp.matrices:
                model.get_submodule(name).weight.mul_(5)
        model.get_output_embeddings().weight.mul_(10)
    return model
