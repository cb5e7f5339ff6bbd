"""What is attacked: finished runs of a tiny model, and one that was stopped in its training.

model/ text.txt other.txt recipe.yaml   what the runs are made from
run/                                    a finished run
another/                                a finished run with another seed: where files are swapped with
stopped/                                a run stopped in its training, with two checkpoints
"""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sparsekd import pipeline
from sparsekd.console import Console
from sparsekd.distillation.worker import Worker
from sparsekd.recipe import load_recipe

MODELS = ("round-01/compressed/model", "round-01/distilled/model")
_SYLLABLES = ("ri", "mo", "gar", "win", "ver", "den", "ter", "low", "ket", "sil")
_STEPS_BEFORE_STOP = 5


def documents(count: int, seed: int) -> list[str]:
    """Distinct documents of 30 to 60 words that no other seed has."""
    generator = random.Random(seed)
    words = [a + b for a in _SYLLABLES for b in _SYLLABLES]
    return [" ".join(generator.choices(words, k=generator.randint(30, 60))) for _ in range(count)]


def make(folder: Path) -> None:
    """Makes all of it; takes seconds."""
    make_inputs(folder)
    recipe = str(folder / "recipe.yaml")
    pipeline.run(load_recipe(recipe), folder / "run", console=Console(quiet=True))
    pipeline.run(load_recipe(recipe, ("seed=7",)), folder / "another", console=Console(quiet=True))
    _stop_in_training(recipe, folder / "stopped")


def make_inputs(folder: Path) -> None:
    """A model, texts, and the recipe for them."""
    (folder / "text.txt").write_text("\n\n".join(documents(120, seed=1)))
    (folder / "other.txt").write_text("\n\n".join(documents(10, seed=2)))
    tokenizer = _tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_for(folder)))


def recipe_for(folder: Path) -> dict[str, Any]:
    return {
        "model": {"name": str(folder / "model")},
        "corpus": {
            "root": str(folder),
            "sources": {"text": {"path": "text.txt", "holdout": 0.2}},
            "seq_len": 32,
            "num_blocks": 24,
            "num_validation_blocks": 4,
        },
        "cache": {"blocks_per_shard": 8, "top_k": 8},
        "compress": {"num_tokens": 256, "reduction": 0.3},
        "distill": {
            "batch_size": 4,
            "micro_batch_size": 2,
            "epochs": 2,
            "checkpoint_minutes": 0,
            "learning_rate": 1e-3,
            "validations": 3,
        },
        "evaluate": {
            "texts": {"held": {"holdout_of": "text"}, "other": {"path": "other.txt"}},
            "context": 32,
            "stride": 16,
            "max_tokens": 128,
            "prompts": ["river"],
        },
    }


def _tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<e>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(documents(50, seed=3), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>", pad_token="<e>")


def _stop_in_training(recipe: str, out: Path) -> None:
    """A run that was stopped between two steps, as a signal stops it after it is saved."""
    steps = 0
    original = Worker.gradients

    def counted(self: Any, *given: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > _STEPS_BEFORE_STOP:
            raise KeyboardInterrupt
        return original(self, *given)

    Worker.gradients = counted
    with contextlib.suppress(KeyboardInterrupt):
        pipeline.run(load_recipe(recipe), out, console=Console(quiet=True))
    Worker.gradients = original


def files_of(folder: Path, within: str = "") -> list[str]:
    """The files that a fault may hit, by their names in the folder: all but what is written anew at each call, or
    never read."""
    rewritten = {"log.jsonl", "report.json", "report.html"}
    found = (path for path in sorted((folder / within).rglob("*")) if path.is_file())
    return [str(path.relative_to(folder)) for path in found if path.name not in rewritten]
