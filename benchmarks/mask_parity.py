"""The masks of `magnitude`, `wanda` and `sparsegpt` against llm-compressor's: the share of positions that agree.

    python benchmarks/mask_parity.py --peers PYTHON [--layers 4] [--tokens 8192]

The first layers of SmolLM2-135M, the same blocks of the embedded corpus, float32, half of the weights of each MLP
matrix. `--peers` is the interpreter of an environment that has llmcompressor (0.14.0.1 was measured) beside torch;
it needs nothing of this project. Bar: 99.9 % of the positions of every matrix, from the same statistics.

- `same`: each layer of ours is pruned in the model whose earlier layers are theirs. This compares the methods.
- `own`: each prunes the model by itself. Of `sparsegpt` a rounding error that decides one mask bit decides many later
  ones, in its row and in the layers above: `itself` is llm-compressor against llm-compressor with other batches.

Its pipeline `sequential` takes the statistics of a layer in the model whose earlier layers are pruned, as `sparsegpt`
does here; its `basic` one takes all of them in the dense model, as `wanda` does here. Wanda has a row for either. Its
magnitude knows no pattern N:M; the tests compare that with a brute force.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

LENGTH, BATCH, OTHER_BATCH = 512, 4, 3
PATTERNS = ("unstructured", "2:4", "4:8")
CASES = [
    ("magnitude", "unstructured", "none"),
    *(("wanda", pattern, "basic") for pattern in PATTERNS),
    *(("wanda", pattern, "sequential") for pattern in PATTERNS),
    *(("sparsegpt", pattern, "sequential") for pattern in PATTERNS),
]
Matrices = dict[str, torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--child", nargs=5, help="one case of llm-compressor's; used by the script itself")
    parser.add_argument("--peers", metavar="PYTHON", help="interpreter of an environment with llmcompressor")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8192)
    given = parser.parse_args()
    if given.child:
        prune(*given.child)
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), given.layers, given.tokens)
        for method, pattern, pipeline in CASES:
            found = {}
            for batch in (BATCH, OTHER_BATCH) if method == "sparsegpt" else (BATCH,):
                words = [method, pattern, pipeline, folder, str(batch)]
                subprocess.run([given.peers, __file__, "--child", *words], check=True, stdout=sys.stderr)
                found[batch] = torch.load(Path(folder) / "theirs.pt")
            version = found[BATCH].pop("version")
            row = {"method": method, "pattern": pattern, "pipeline": pipeline, "llmcompressor": version}
            rows.append(row | agreements(Path(folder), method, pattern, found))
            print(rows[-1], flush=True)
    from _record import record  # here: the other environment has no sparsekd

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
    settings = (f"corpus.num_blocks={num_tokens // LENGTH}", f"corpus.seq_len={LENGTH}")
    recipe = load_recipe("demo", (*settings, "corpus.num_validation_blocks=2"))
    built = corpus.build(recipe.corpus, {}, tokenizer, seed=42)
    np.save(folder / "blocks.npy", np.stack(built.tokens(built.train_ids)).astype(np.int64))


def agreements(folder: Path, method: str, pattern: str, theirs: dict[int, Matrices]) -> dict[str, Any]:
    """All comparisons of one case."""
    own = ours(folder, method, pattern)
    found = {"own": agreement(own, theirs[BATCH])}
    if method == "sparsegpt":
        same = agreement(ours(folder, method, pattern, theirs[BATCH]), theirs[BATCH])
        found = {"same": same} | found | {"itself": agreement(theirs[BATCH], theirs[OTHER_BATCH])}
    return found


def agreement(one: Matrices, other: Matrices) -> dict[str, Any]:
    """Of all positions, and of the matrix that agrees least."""
    agrees = {name: (weight == 0) == (other[name] == 0) for name, weight in one.items()}
    by_matrix = {name: float(same.float().mean()) for name, same in agrees.items()}
    least = min(by_matrix, key=lambda name: by_matrix[name])
    of_all = sum(int(same.sum()) for same in agrees.values()) / sum(same.numel() for same in agrees.values())
    return {"of_all": of_all, "least": by_matrix[least], "least_of": least}


def ours(folder: Path, method: str, pattern: str, theirs: Matrices | None = None) -> Matrices:
    """Our pruned matrices; with `theirs` these take the place of each layer's before the next one is pruned."""
    import sparsekd
    from sparsekd.compression.walk import Walk
    from sparsekd.device import exact_products
    from sparsekd.models import find_mlps, linear_weight

    model, _ = sparsekd.load(str(folder / "model"))
    mlps, step, found = find_mlps(model), Walk.step, {}

    def replaced(walk: Walk, layer: int) -> Any:
        for name in mlps[layer].matrices:
            weight = linear_weight(model.get_submodule(name)).detach()
            found[name] = weight.clone()
            if theirs is not None:
                weight.copy_(theirs[name])
        return step(walk, layer)

    blocks = torch.from_numpy(np.load(folder / "blocks.npy"))
    with exact_products(True), patch.object(Walk, "step", replaced):
        sparsekd.compress(model, blocks, method=method, pattern=pattern, reduction=0.5)
    names = [name for mlp in mlps for name in mlp.matrices]
    return found or {name: linear_weight(model.get_submodule(name)).detach() for name in names}


def prune(method: str, pattern: str, pipeline: str, folder: str, batch: str) -> None:
    """Prunes with llm-compressor and keeps the MLPs' matrices; runs in its environment."""
    import llmcompressor  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32).eval()
    if method == "magnitude":
        prune_by_magnitude(model)
    else:
        prune_on_text(model, method, pattern, pipeline, np.load(f"{folder}/blocks.npy"), int(batch))
    matrices = {name: module.weight.detach() for name, module in model.named_modules() if name.endswith("_proj")}
    kept = {name: weight for name, weight in matrices.items() if ".mlp." in name}
    torch.save({**kept, "version": llmcompressor.__version__}, f"{folder}/theirs.pt")


def prune_by_magnitude(model: Any) -> None:
    """Its modifier belongs to a training: the first step's events, whose mask is then applied."""
    from llmcompressor.core import Event, EventType, State  # pyright: ignore[reportMissingImports]
    from llmcompressor.modifiers.pruning import MagnitudePruningModifier  # pyright: ignore[reportMissingImports]

    state, shares = State(model=model), {"init_sparsity": 0.5, "final_sparsity": 0.5}
    modifier = MagnitudePruningModifier(targets=[r"re:.*\.mlp\..*_proj$"], start=0, end=1, **shares)
    modifier.on_initialize(state)
    modifier.on_start(state, Event(type_=EventType.BATCH_START))
    modifier.on_update(state, Event(type_=EventType.OPTIM_POST_STEP))


def prune_on_text(model: Any, method: str, pattern: str, pipeline: str, blocks: np.ndarray, batch: int) -> None:
    from llmcompressor import oneshot  # pyright: ignore[reportMissingImports]
    from llmcompressor.modifiers import pruning  # pyright: ignore[reportMissingImports]

    kind = {"wanda": pruning.WandaPruningModifier, "sparsegpt": pruning.SparseGPTModifier}[method]
    structure = "0:0" if pattern == "unstructured" else pattern
    ignored = [r"re:.*attn.*", r"re:lm_head.*"]
    modifier = kind(sparsity=0.5, mask_structure=structure, targets=["Linear"], ignore=ignored)
    rows: Any = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in torch.from_numpy(blocks)]
    loader = torch.utils.data.DataLoader(rows, batch_size=batch)
    oneshot(model=model, dataset=loader, recipe=modifier, pipeline=pipeline)


if __name__ == "__main__":
    main()
