"""SparseKD as a library: cache, compress, distill, measure, save, load. Run it with a model of your own:

    python examples/quickstart.py MODEL TEXT.txt OUT

MODEL is a folder, a Hub id, a .gguf file or smollm2-135m; TEXT.txt any text of a few thousand words.
"""

import sys
from pathlib import Path

import torch

import sparsekd


def main(name: str, text_file: str, out: str) -> None:
    model, tokenizer = sparsekd.load(name)
    text = Path(text_file).read_text(encoding="utf-8")
    learn, held_out = text[: len(text) * 4 // 5], text[len(text) * 4 // 5 :]
    blocks = torch.from_numpy(sparsekd.blocks_from_texts([learn], tokenizer, seq_len=128))

    def measure(title: str) -> None:
        result = sparsekd.perplexity(model, tokenizer, held_out)
        error = "" if result.standard_error is None else f" +- {result.standard_error:.2f}"
        print(f"{title:<12} perplexity {result.perplexity:.2f}{error}")

    measure("dense")
    cache = sparsekd.cache_teacher(model, tokenizer, blocks, Path(out) / "cache")
    sparsekd.compress(model, blocks, reduction=0.15)  # changes the model in place
    measure("compressed")
    sparsekd.distill(model, blocks, cache, epochs=2, learning_rate=1e-4)
    measure("distilled")

    sparsekd.save(model, tokenizer, Path(out) / "model")
    again, tokenizer = sparsekd.load(str(Path(out) / "model"))
    prompt = tokenizer(held_out[:200], return_tensors="pt")
    print(tokenizer.decode(again.generate(**prompt, max_new_tokens=20)[0]))


if __name__ == "__main__":
    main(*sys.argv[1:])
