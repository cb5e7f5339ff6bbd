"""SmolLM2-135M: one step of the truncation after the other, before training and after 51,200 tokens of it.

    python benchmarks/truncation_ablation.py DATA [--reductions 0.15] [--arms NAME] [--train] [--seeds 42] [--rate 1e-4]

DATA is a folder as recipes/local-mixture.yaml describes it. Every arm has the same corpus, statistics (98,304 tokens),
budget and training (one pass over 200 of the blocks), so what differs is the truncation alone; the learning rate
follows the damage by one rule. Ratios of strict perplexity to the dense model's on 4,096 tokens of WikiText-2 test and
of held-out C4. `SVD-LLM` and `ASVD` are the published algorithms, uniform ranks, on the same tokens: the truncated SVD
of W S, with S the Cholesky factor of E[x x^T], or S = diag(E|x|)^0.5. `shared basis` stacks gate and up on one input
basis at the ranks that the pivot format of the stack affords, and trains it as two factors: the same matrices, another
parametrisation; so does `pivot ranks, two factors` with the matrices of `two-sided, no probe`. The perplexities are the
product's; so is everything not named here.

An arm that benchmarks/results/truncation_ablation.json holds already is not run again: kill it and go on at any time.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from _record import RESULTS, record

import sparsekd
from sparsekd import compression, corpus, distillation, teacher
from sparsekd.compression import directions, statistics
from sparsekd.compression.allocation import Curve, allocate
from sparsekd.evaluate import ratio
from sparsekd.models import find_mlps, forms, linear_weight, replace_module
from sparsekd.models.forms.lowrank import make_layer, put
from sparsekd.recipe import Recipe, compress_section, load_recipe

NAME, STATISTICS_TOKENS, TRAINING_BLOCKS, PROBE_TOKENS, TEST_TOKENS = "truncation_ablation", 98_304, 200, 1024, 4096
ARMS: dict[str, dict[str, Any]] = {
    "svd": {"method": "svd", "format": "lowrank"},
    "svd, tiers": {"method": "svd", "format": "lowrank", "allocation": "energy"},
    "SVD-LLM": {},
    "ASVD": {},
    "whitened": {"method": "whitened", "format": "lowrank"},
    "+ pivot": {"method": "whitened", "format": "pivot"},
    "+ global": {"method": "whitened", "format": "pivot", "allocation": "global", "probe_tokens": PROBE_TOKENS},
    "+ two-sided": {"method": "two-sided", "format": "pivot", "allocation": "global", "probe_tokens": PROBE_TOKENS},
    "two-sided, no probe": {"method": "two-sided", "format": "pivot", "allocation": "global"},
    "two-sided, uniform": {"method": "two-sided", "format": "pivot"},
    "two-sided, lowrank": {"method": "two-sided", "format": "lowrank", "allocation": "global"},
    "pivot ranks, two factors": {"method": "two-sided", "format": "pivot", "allocation": "global"},
    "shared basis": {},
}


@dataclasses.dataclass
class Setup:
    """What all arms share."""

    recipe: Recipe
    model: Any
    tokenizer: Any
    texts: dict[str, str]  # to measure on, TEST_TOKENS of each
    batches: list[torch.Tensor]  # of the statistics, then of the probe
    moments: Any
    ids: np.ndarray  # of the blocks to train on
    data: distillation.Data | None

    def measure(self, model: Any) -> dict[str, Any]:
        """Perplexity by text."""
        return {
            name: sparsekd.perplexity(model, self.tokenizer, text, max_tokens=TEST_TOKENS)
            for name, text in self.texts.items()
        }


def prepare(folder: str, *, train: bool, training_blocks: int = TRAINING_BLOCKS) -> Setup:
    num_blocks = (STATISTICS_TOKENS + PROBE_TOKENS) // 256
    overrides = (f"corpus.root={folder}", "corpus.seq_len=256", f"corpus.num_blocks={num_blocks}")
    recipe = load_recipe(str(Path(__file__).parents[1] / "recipes" / "local-mixture.yaml"), overrides)
    model, tokenizer = sparsekd.load()
    built = corpus.build(recipe.corpus, recipe.evaluate.texts, tokenizer, recipe.seed)
    ids = built.order(recipe.seed, 0)
    batches = list(torch.from_numpy(np.stack(built.tokens(ids.tolist())).astype(np.int64)).split(4))
    seen = batches[: STATISTICS_TOKENS // batches[0].numel()]  # the probe's tokens are others
    kept = Path(tempfile.gettempdir()) / f"{NAME}_{built.fingerprint}"
    moments = _statistics(model, seen, kept.with_suffix(".pt"))
    ids = ids[:training_blocks]
    data = _training_data(model, built, ids, kept.with_name(f"{kept.name}_{training_blocks}")) if train else None
    return Setup(recipe, model, tokenizer, built.texts, batches, moments, ids, data)


def train(setup: Setup, student: Any, learning_rate: float, seed: int = 42, num_blocks: int = TRAINING_BLOCKS) -> Any:
    """A trained copy of the student: one pass over the first `num_blocks` blocks, in the order of the seed."""
    assert setup.data is not None
    trained = copy.deepcopy(student)
    data = dataclasses.replace(setup.data, order=functools.partial(corpus.shuffled, setup.ids[:num_blocks], seed))
    options = dataclasses.replace(
        setup.recipe.distill, learning_rate=learning_rate, epochs=1, micro_batch_size=2, validations=2
    )
    distillation.train(trained, data, options)
    return trained


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("--reductions", type=float, nargs="+", default=[0.15, 0.35, 0.65])
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--rate", type=float, help="instead of the rule's learning rate")
    given = parser.parse_args()
    setup = prepare(given.data, train=given.train)
    path = RESULTS / f"{NAME}.json"
    found = json.loads(path.read_text()) if path.exists() else {"arms": {}}
    dense = setup.measure(setup.model)
    found["dense_perplexity"] = {text: [p.perplexity, p.standard_error] for text, p in dense.items()}

    def save(key: str, part: str, value: Any) -> None:
        found["arms"].setdefault(key, {})[part] = value
        record(NAME, {name: found[name] for name in ("dense_perplexity", "arms")}, show=False)
        print(key, part, value, flush=True)

    for reduction in given.reductions:
        for name in given.arms:
            key = f"{name} at {reduction:.0%}"
            suffix = "" if given.rate is None else f", rate {given.rate:g}"
            afters = {f"after, seed {seed}{suffix}": seed for seed in given.seeds if given.train}
            wanted = ["before", *afters]
            if all(part in found["arms"].get(key, {}) for part in wanted):
                continue
            student, facts = truncated(setup, name, reduction)
            before = found["arms"].get(key, {}).get("before")
            if before is None:
                before = ratios(setup.measure(student), dense)
                save(key, "plan", facts)
                save(key, "before", before)
            for part, seed in afters.items():
                if part in found["arms"][key]:
                    continue
                rate = given.rate or _rate(before)
                trained = train(setup, student, rate, seed)
                save(key, part, ratios(setup.measure(trained), dense))
                if given.rate is None:
                    save(key, "learning_rate", rate)


def ratios(measured: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    return {text: ratio(measured[text], dense[text]) for text in measured}


def _rate(before: dict[str, Any]) -> float:
    """What was broken more needs a higher learning rate; the bounds are from trials on other text."""
    worst = max(value for value, _ in before.values())
    return 3e-5 if worst < 1.6 else 1e-4 if worst < 5 else 3e-4


def _statistics(model: Any, batches: list[torch.Tensor], path: Path) -> Any:
    """What all arms share, and what the published methods need; kept outside the repository for the next call here."""
    if not path.exists():
        with _inputs(model) as inputs:
            moments = statistics.collect(model, batches, curvature=True)
        torch.save((moments, inputs), path)
    return torch.load(path, weights_only=False)


@contextlib.contextmanager
def _inputs(model: Any) -> Iterator[dict[str, Any]]:
    """E[x x^T] and E|x| of every MLP matrix's input, as the published methods take them: no token is capped."""
    sums: dict[str, Any] = {}
    mlps = find_mlps(model)

    def reads(name: str) -> Any:
        def hook(_: Any, args: Any) -> None:
            if torch.is_grad_enabled():  # each layer runs a second time for the curvature
                return
            x = args[0].flatten(0, -2)
            count, gram, absolute = sums.get(name, (0, 0, 0))
            sums[name] = (count + len(x), gram + (x.T @ x).double(), absolute + x.abs().sum(0).double())

        return hook

    handles = [
        model.get_submodule(name).register_forward_pre_hook(reads(name))
        for mlp in mlps
        for name in (mlp.inputs[0], mlp.output)
    ]
    means: dict[str, Any] = {}
    yield means
    for handle in handles:
        handle.remove()
    means.update({name: (gram / count, absolute / count) for name, (count, gram, absolute) in sums.items()})
    means.update({mlp.inputs[1]: means[mlp.inputs[0]] for mlp in mlps})


def truncated(setup: Setup, name: str, reduction: float) -> tuple[Any, dict[str, Any]]:
    moments, inputs = setup.moments
    student = copy.deepcopy(setup.model)
    start = time.perf_counter()
    if name in ("SVD-LLM", "ASVD"):
        plan = _published(student, inputs, name, reduction)
    elif name == "shared basis":
        return student, _share(student, moments, reduction)
    else:
        with patch.object(statistics, "collect", lambda *args, **options: dict(moments)):
            calibration = compression.Calibration(student, compression.batches_of(setup.batches, 4))
            section = compress_section({"reduction": reduction, **ARMS[name]})
            plan = compression.apply(student, lambda step: calibration, section)
    if name == "pivot ranks, two factors":
        sparsekd.convert(student, "lowrank")
    facts = plan.as_dict()
    facts["seconds"] = time.perf_counter() - start
    del facts["matrices"]
    return student, facts


def _published(student: Any, inputs: dict[str, Any], name: str, reduction: float) -> compression.Plan:
    """SVD-LLM (arXiv 2403.07378, algorithm 1) and ASVD (arXiv 2312.05821, alpha 0.5) on the MLP, uniform ranks."""
    section, dense = compress_section({"reduction": reduction, "format": "lowrank"}), forms.dense_sizes(student)
    plan = compression.plan_for(student, section)
    factors = {}
    for matrix in plan.matrices:
        weight = linear_weight(student.get_submodule(matrix.name)).detach().double()
        gram, absolute = inputs[matrix.name]
        if name == "SVD-LLM":
            scale = torch.linalg.cholesky(gram + 1e-6 * gram.diagonal().mean() * torch.eye(len(gram)))
        else:
            scale = torch.diag(absolute.sqrt())
        u, s, v = torch.linalg.svd(weight @ scale, full_matrices=False)
        up, down = u * s.sqrt(), torch.linalg.solve(scale, s.sqrt()[:, None] * v, left=False)
        factors[matrix.name] = (up[:, : matrix.rank].float(), down[: matrix.rank].float())
    put(student, factors, "lowrank")
    forms.mark(student, "lowrank", name, reduction, dense)
    return plan


def _share(student: Any, moments: Any, reduction: float) -> dict[str, Any]:
    """Gate and up stacked on one input basis, two-sided, one global budget counted in the pivot format of the stack."""
    curves, found = [], []
    for mlp in find_mlps(student):
        seen = moments[mlp]
        stack = torch.cat([linear_weight(student.get_submodule(name)).detach() for name in mlp.inputs])
        curvature = torch.cat([seen.input_curvature[name].mean() for name in mlp.inputs])
        output = linear_weight(student.get_submodule(mlp.output)).detach()
        for names, weight, projection in (
            (mlp.inputs, stack, directions.from_input_gram(stack, seen.input.mean(), curvature)),
            ((mlp.output,), output, directions.from_output_gram(seen.output.mean(), seen.output_curvature.mean())),
        ):
            full, lost = min(weight.shape), projection.lost().numpy()
            ranks = np.arange(20, full + 1)
            costs = np.append(ranks[:-1] * sum(weight.shape) - ranks[:-1] ** 2, weight.numel())
            curves.append(Curve(ranks, costs, np.append(lost[ranks[:-1]], 0.0)))
            found.append((names, weight, projection))
    budget = (1 - reduction) * sum(float(curve.costs[-1]) for curve in curves)
    for (names, weight, projection), rank in zip(found, allocate(curves, budget), strict=True):
        if rank == min(weight.shape):
            continue
        up, down = projection.factors(weight, rank)
        basis = torch.nn.Parameter(down)
        for name, part in zip(names, up.chunk(len(names)), strict=True):
            layer = make_layer("two-factors", part, down)
            layer.down.weight = basis
            replace_module(student, name, layer)
    return {"mlp_reduction": reduction}


def _training_data(model: Any, built: corpus.Corpus, ids: np.ndarray, folder: Path) -> distillation.Data:
    blocks = [block.tokens for block in built.blocks]
    used = {int(i): blocks[i] for i in (*ids, *built.validation_ids)}
    made_from: dict[str, Any] = {"tokenizer_hash": "benchmark", "corpus_fingerprint": built.fingerprint}
    cache = teacher.fill(model, folder, used, **made_from)
    assert cache is not None
    order, sources = functools.partial(corpus.shuffled, ids, 42), [block.source for block in built.blocks]
    return distillation.Data(blocks, order, built.validation_ids.tolist(), cache, sources)


if __name__ == "__main__":
    main()
