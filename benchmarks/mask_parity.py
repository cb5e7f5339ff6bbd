"""The masks of `magnitude`, `wanda` and `sparsegpt` against llm-compressor's: the share of positions that agree.

    python benchmarks/mask_parity.py --peers PYTHON [--layers 4] [--tokens 8192]

The first layers of SmolLM2-135M, the same blocks of the embedded corpus, float32, half of the weights of each MLP
matrix. `--peers` is the interpreter of an environment that has llmcompressor (0.14.0.1 was measured) beside torch;
it needs nothing of this project. Bar: 99.9 % of the positions of every matrix.

llm-compressor's `sequential` pipeline takes the statistics of a layer in the model whose earlier layers are pruned, as
SparseGPT does here; its `basic` one takes all of them in the dense model, as `wanda` does here. Both are compared for
Wanda. Its magnitude knows no pattern N:M, which the tests compare with a brute force.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

BLOCK = 512
CASES = [
    ("magnitude", "unstructured", None),
    *(("wanda", pattern, "basic") for pattern in ("unstructured", "2:4", "4:8")),
    *(("wanda", pattern, "sequential") for pattern in ("unstructured", "2:4", "4:8")),
    *(("sparsegpt", pattern, "sequential") for pattern in ("unstructured", "2:4", "4:8")),
]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--child", nargs=5, help="one case of llm-compressor's; used by the script itself")
    parser.add_argument("--peers", metavar="PYTHON", help="interpreter of an environment with llmcompressor")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8192)
    given = parser.parse_args()
    if given.child:
        theirs(*given.child)
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), given.layers, given.tokens)
        for method, pattern, pipeline in CASES:
            words = [method, pattern, str(pipeline), folder, f"{folder}/theirs.npz"]
            subprocess.run([given.peers, __file__, "--child", *words], check=True, stdout=sys.stderr)
            rows += compared(Path(folder), method, pattern, pipeline)
            print(rows[-1], flush=True)
    from _record import record

    record("mask_parity", {"layers": given.layers, "tokens": given.tokens, "bar": 0.999, "rows": rows}, show=False)


def prepare(folder: Path, layers: int, num_tokens: int) -> None:
    """The model's first layers, and the blocks."""
    import sparsekd
    from sparsekd import corpus
    from sparsekd.recipe import load_recipe

    model, tokenizer = sparsekd.load()
    model = model.float()
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    sparsekd.save(model, tokenizer, folder / "model")
    settings = (f"corpus.num_blocks={num_tokens // BLOCK}", f"corpus.seq_len={BLOCK}")
    built = corpus.build(load_recipe("demo", (*settings, "corpus.num_validation_blocks=2")).corpus, {}, tokenizer, 42)
    np.save(folder / "blocks.npy", np.stack(built.tokens(built.train_ids)).astype(np.int64))


def compared(folder: Path, method: str, pattern: str, pipeline: str | None) -> list[dict[str, Any]]:
    """A row for the case, with the matrix that agrees least."""
    import sparsekd
    from sparsekd.device import exact_products
    from sparsekd.models import find_mlps

    model, _ = sparsekd.load(str(folder / "model"))
    with exact_products(True):
        blocks = torch.from_numpy(np.load(folder / "blocks.npy"))
        sparsekd.compress(model, blocks, method=method, pattern=pattern, reduction=0.5)
    theirs, agreement, same, size = np.load(folder / "theirs.npz"), {}, 0, 0
    for name in (name for mlp in find_mlps(model) for name in mlp.matrices):
        agrees = (model.get_submodule(name).weight == 0).numpy() == theirs[name]
        agreement[name], same, size = float(agrees.mean()), same + int(agrees.sum()), size + agrees.size
    least = min(agreement, key=lambda name: agreement[name])
    found = {"agreement": same / size, "least": agreement[least], "least_of": least, "by_matrix": agreement}
    versions = {"llmcompressor": str(theirs["version"])}
    return [{"method": method, "pattern": pattern, "pipeline": pipeline, "versions": versions} | found]


def theirs(method: str, pattern: str, pipeline: str, folder: str, out: str) -> None:
    """Prunes with llm-compressor and keeps where the zeros are; runs in its environment."""
    import llmcompressor  # pyright: ignore[reportMissingImports]
    from llmcompressor import oneshot  # pyright: ignore[reportMissingImports]
    from llmcompressor.modifiers import pruning  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32).eval()
    structure = "0:0" if pattern == "unstructured" else pattern
    shared = {
        "sparsity": 0.5,
        "mask_structure": structure,
        "targets": ["Linear"],
        "ignore": ["re:.*attn.*", "re:lm_head.*"],
    }
    if method == "magnitude":
        magnitude(model)
    else:
        kind = {"wanda": pruning.WandaPruningModifier, "sparsegpt": pruning.SparseGPTModifier}[method]
        blocks = torch.from_numpy(np.load(f"{folder}/blocks.npy"))
        batches = [{"input_ids": block, "attention_mask": torch.ones_like(block)} for block in blocks]
        loader = torch.utils.data.DataLoader(batches, batch_size=4)  # pyright: ignore[reportArgumentType]
        oneshot(model=model, dataset=loader, recipe=kind(**shared), pipeline=pipeline)
    masks = {n: (m.weight == 0).numpy() for n, m in model.named_modules() if ".mlp." in n and hasattr(m, "weight")}
    np.savez(out, version=llmcompressor.__version__, **masks)


def magnitude(model: Any) -> None:
    """Its modifier belongs to a training: the first step's events, whose mask is then applied."""
    from llmcompressor.core import Event, EventType, State  # pyright: ignore[reportMissingImports]
    from llmcompressor.modifiers.pruning import MagnitudePruningModifier  # pyright: ignore[reportMissingImports]

    state, names = State(model=model), ["re:.*mlp.*proj.weight"]
    modifier = MagnitudePruningModifier(targets=names, init_sparsity=0.5, final_sparsity=0.5, start=0, end=1)
    modifier.on_initialize(state)
    modifier.on_start(state, Event(type_=EventType.BATCH_START))
    modifier.on_update(state, Event(type_=EventType.OPTIM_POST_STEP))


if __name__ == "__main__":
    main()
