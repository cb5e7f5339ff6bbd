"""Kills `sparsekd distill` at its write calls and at random moments, calls it again, and compares the final bytes.

    python benchmarks/crash.py [--kills 100] [--random 20] [--until distill]

The run is corpus, cache, compress and distill of a tiny model, with a shard for every block and a checkpoint after
every step. Python reports every file that it opens for writing, renames or removes (an audit hook, nothing in the
package is changed); a child process counts those in its run directory and kills itself with SIGKILL before the nth.
Then the same command is given again. Compared are the sha256 of all shards with their manifest, and of the distilled
model. Exit code 1 if any differs. Children are forked from a process that has imported everything and computed
nothing, so that a kill costs a second.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import yaml
from _record import record
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sparsekd import pipeline
from sparsekd.console import Console
from sparsekd.recipe import load_recipe

_WRITES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}


class Silent(Console):
    def say(self, text: str) -> None:
        pass


def make_recipe(folder: Path) -> Path:
    """A two-layer model, its tokenizer, a text, and a recipe for them."""
    words = [f"{a}{b}" for a in ("ri", "mo", "gar", "win") for b in ("ver", "den", "ter", "low", "ket")]
    generator = random.Random(0)  # noqa: S311
    documents = [" ".join(generator.choices(words, k=40)) for _ in range(120)]
    (folder / "text.txt").write_text("\n\n".join(documents))
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<e>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(documents, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")  # noqa: S106
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    sections: dict[str, Any] = {
        "model": {"name": str(folder / "model")},
        "corpus": {"root": str(folder), "sources": {"text": {"path": "text.txt"}}, "seq_len": 32},
        "cache": {"blocks_per_shard": 1, "top_k": 8},
        "compress": {"num_tokens": 128},
        "distill": {"batch_size": 2, "micro_batch_size": 2, "checkpoint_minutes": 0, "learning_rate": 1e-3},
    }
    sections["corpus"] |= {"num_blocks": 12, "num_validation_blocks": 2}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(sections))
    return folder / "recipe.yaml"


def in_child(work: Any, kill_after_s: float | None = None) -> int:
    """Runs `work` in a forked child; its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            work()
            code = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(code)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(recipe: Path, out: Path, until: str, *, kill_at: int | None = None, count_to: Path | None = None) -> None:
    """The run, in this process, which dies before its write call number `kill_at`."""
    calls = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal calls
        writes = event in _WRITES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & 3)
        if writes and isinstance(arguments[0], (str, os.PathLike)) and str(arguments[0]).startswith(str(out)):
            calls += 1
            if calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    pipeline.run(load_recipe(str(recipe)), out, until=until, console=Silent())
    if count_to is not None:
        count_to.write_text(str(calls))


def final_bytes(out: Path) -> dict[str, str]:
    """sha256 of what a run leaves: shards, their manifest, the distilled model."""
    folders = [out / "round-01/cache", out / "round-01/distilled/model"]
    found = [path for folder in folders if folder.exists() for path in sorted(folder.iterdir())]
    kept = [path for path in found if path.name != "stage.json"]  # it says how long the stage took
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--random", type=int, default=20)
    parser.add_argument("--until", default="distill", choices=["cache", "distill"])
    parser.add_argument("--no-record", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name).resolve()
        if in_child(lambda: make_recipe(scratch)) != 0:
            sys.exit(1)
        recipe, out = scratch / "recipe.yaml", scratch / "run"
        start = time.monotonic()
        if in_child(lambda: run(recipe, scratch / "straight", options.until, count_to=scratch / "calls")) != 0:
            sys.exit(1)
        seconds = time.monotonic() - start
        expected, calls = final_bytes(scratch / "straight"), int((scratch / "calls").read_text())
        wrong: list[str] = []

        def killed(title: str, kills: list[tuple[int | None, float | None]]) -> None:
            """Each of `kills` is a write call or a moment to die at; then the run is called once more."""
            for call, moment in kills:
                in_child(lambda call=call: run(recipe, out, options.until, kill_at=call), moment)
            last = in_child(lambda: run(recipe, out, options.until))
            same = last == 0 and final_bytes(out) == expected
            print(f"killed at {title}: {'the same bytes' if same else 'OTHER BYTES'}", file=sys.stderr)
            if not same:
                wrong.append(title)
            shutil.rmtree(out)

        for i in range(options.kills):
            call = 1 + round(i * (calls - 1) / max(1, options.kills - 1))
            killed(f"write call {call} of {calls}", [(call, None)])
        generator = random.Random(0)  # noqa: S311
        for _ in range(options.random):
            moments = [generator.uniform(0, seconds) for _ in range(generator.randint(1, 3))]
            killed(f"{', '.join(f'{moment:.2f}' for moment in moments)} s", [(None, moment) for moment in moments])
    figures = {"until": options.until, "write_calls": calls, "kills_at_calls": options.kills}
    figures |= {"runs_killed_at_random": options.random, "files_compared": len(expected), "not_the_same": wrong}
    if options.no_record:
        print(figures)
    else:
        record("crash", figures)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
