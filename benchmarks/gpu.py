"""What a GPU makes of SparseKD: the speed of each stage beside the bare passes it consists of, and its memory.

    python benchmarks/gpu.py OUT [--model MODEL] [--seconds 240] [--device cuda] [--tiny]

OUT is a file of JSON lines, one for each figure, written as soon as it is there, so that a run that is cut off still
tells. Without a MODEL, a Qwen3-0.6B of random weights on random tokens: speed does not depend on them. `--tiny` is a
rehearsal of all of it in seconds, on any device. `benchmarks/gpu.sh` runs it on a bare machine.
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import functools
import json
import pstats
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from _record import origin, summary
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from sparsekd import distillation, models, teacher
from sparsekd.compression import compress
from sparsekd.device import peak_device_memory_bytes
from sparsekd.distillation import fused, losses
from sparsekd.models.forms import width
from sparsekd.recipe import Distill
from sparsekd.teacher import Cache

QWEN3 = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "tie_word_embeddings": True,
}
COMPRESSION = ["output_curvature", "_removal_of", "removal", "compensated", "_backward", "_drawn"]  # functions timed
IDENTITY: dict[str, Any] = {"tokenizer_hash": "benchmark", "corpus_fingerprint": "benchmark"}

Rows = Iterator[dict[str, Any]]


@dataclass
class Bench:
    """A model and its tokens, and how large a step is."""

    model: Callable[[], PreTrainedModel]  # in float32, on the device
    tokens: Tensor  # N x L, on the host
    batch: int
    device: torch.device
    folder: Path

    def blocks(self) -> dict[int, np.ndarray]:
        return {number: row.numpy().astype(np.int32) for number, row in enumerate(self.tokens)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", nargs="*", choices=FIGURES, default=list(FIGURES))
    given = parser.parse_args()
    end = time.monotonic() + given.seconds
    write(given.out, "machine", machine(torch.device(given.device), 256 if given.tiny else 8192) | origin())
    with tempfile.TemporaryDirectory() as folder:
        bench = prepared(given, Path(folder))
        for name in given.only:
            start = time.monotonic()
            if start > end:
                write(given.out, name, {"left_out": f"no time left of {given.seconds:g} s"})
                continue
            try:
                for row in FIGURES[name](bench):
                    write(given.out, name, row | {"seconds": round(time.monotonic() - start, 2)})
            except Exception:  # the next figure may still be had
                write(given.out, name, {"failed": traceback.format_exc(limit=-6)})
            release(bench.device)


def prepared(given: argparse.Namespace, folder: Path) -> Bench:
    device = torch.device(given.device)
    length, count, batch = (64, 16, 4) if given.tiny else (512, 64, 16)
    torch.manual_seed(0)
    config = Qwen3Config(**(TINY if given.tiny else QWEN3))

    def make() -> PreTrainedModel:
        if given.model:
            model: Any = models.load(given.model, dtype=torch.float32)[0]
            return model.to(device)
        with torch.device(device):
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)

    return Bench(make, torch.randint(0, min(config.vocab_size, 49000), (count, length)), batch, device, folder)


def write(out: Path, figure: str, found: dict[str, Any]) -> None:
    line = json.dumps({"figure": figure} | found)
    with out.open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)


def release(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def seconds(device: torch.device, action: Callable[[], Any], repeats: int = 3) -> dict[str, float]:
    """Of one call, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return summary(times[1:])


def rate(tokens: int, found: dict[str, float]) -> float:
    return round(tokens / found["median"])


# ---- the figures


def machine(device: torch.device, size: int) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device.type == "cuda" else "the host"
    found: dict[str, Any] = {"device": name, "torch": torch.__version__}
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.randn(size, size, device=device, dtype=dtype)
        taken = seconds(device, lambda a=a: a @ a)
        found[f"tflops_{str(dtype).removeprefix('torch.')}"] = round(2 * size**3 / taken["median"] / 1e12, 1)
    return found


def passes(bench: Bench) -> Rows:
    """The bare forward pass in bfloat16, and the cache stage, which consists of it and a hash of the weights."""
    model = bench.model().bfloat16().eval()
    hashed = seconds(bench.device, lambda: models.weights_hash(model), 1)["median"]
    for size in (4, bench.batch):
        batches = bench.tokens.to(bench.device).split(size)

        @torch.inference_mode()
        def bare(batches: Any = batches) -> None:
            for batch in batches:
                _ = model(input_ids=batch, use_cache=False).logits

        def cache(size: int = size) -> None:
            with tempfile.TemporaryDirectory() as folder:
                teacher.fill(model, Path(folder), bench.blocks(), batch_size=size, **IDENTITY)

        def answers(batches: Any = batches) -> None:
            for batch in batches:
                _ = teacher.distributions(model, batch, 32)

        plain, kept = seconds(bench.device, bare), seconds(bench.device, answers)
        whole = seconds(bench.device, cache, repeats=1)
        yield {
            "at once": size,
            "forward_tokens_per_second": rate(bench.tokens.numel(), plain),
            "with_top_k_tokens_per_second": rate(bench.tokens.numel(), kept),
            "cache_tokens_per_second": rate(bench.tokens.numel(), whole),
            "cache_without_hash_to_forward": round(plain["median"] / (whole["median"] - hashed), 3),
            "hash_seconds": round(hashed, 2),
        }


def structural(bench: Bench) -> Rows:
    """The structural step by neurons, and where its time goes."""
    model = bench.model()
    profile = cProfile.Profile()
    start = time.perf_counter()
    profile.enable()
    compress(model, bench.tokens[: 4 * bench.batch], method="neurons", reduction=0.35)
    profile.disable()
    taken = time.perf_counter() - start
    stats: Any = pstats.Stats(profile)
    parts = {
        where[2]: round(values[3], 2)
        for where, values in stats.stats.items()
        if where[2] in COMPRESSION and "sparsekd" in where[0]
    }
    peak = peak_device_memory_bytes(bench.device)
    yield {
        "tokens": bench.tokens[: 4 * bench.batch].numel(),
        "compress_seconds": round(taken, 2),
        "parts": parts,
        "peak_bytes": peak,
    }


def training(bench: Bench) -> Rows:
    """Plain fine-tuning of the dense model, and our training of a narrower one, in bfloat16: tokens a second, peak."""
    dense = bench.model()
    for size in (bench.batch, 4):
        release(bench.device)
        yield {"loop": "fine-tuning", "at once": size} | fine_tuning(dense, bench, size)
    with torch.autocast(bench.device.type, torch.bfloat16):
        cache = teacher.fill(dense, bench.folder / "cache", bench.blocks(), batch_size=bench.batch, **IDENTITY)
    del dense
    student = narrowed(bench)
    not_compiled = patch.object(fused, "_compiled_step", fused._plain_step)
    for loop, is_compiled, size, changes in (
        ("ours, not compiled", False, bench.batch, nullcontext()),
        ("ours, layers compiled", True, bench.batch, not_compiled),
        ("ours, layers and loss compiled", True, bench.batch, nullcontext()),
        ("ours, layers compiled", True, 4, not_compiled),
        ("ours, not compiled", False, 4, nullcontext()),
    ):
        release(bench.device)
        with patch.object(distillation.loop, "is_worth_compiling", lambda *_, chosen=is_compiled: chosen), changes:
            yield {"loop": loop, "at once": size} | ours(student, cache, bench, size)


def gradients(bench: Bench) -> Rows:
    """The fused loss in bfloat16 against autograd through the logits in float32: relative errors of its gradients."""
    generator = torch.Generator(bench.device).manual_seed(0)
    normal = functools.partial(torch.randn, generator=generator, device=bench.device)
    hidden, weight = normal(600, 256).bfloat16().float(), normal(5000, 256).bfloat16().float() / 16
    labels = torch.randint(5000, (600,), generator=generator, device=bench.device)
    targets = teacher.top_k_distribution(hidden @ weight.T + normal(600, 5000), 32)
    targets = type(targets)(*(value.clone() for value in targets))
    options: dict[str, Any] = {"alpha": 0.5, "temperature": 2.0, "denominator": 600}
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    exact = torch.autograd.grad(losses.kd_loss(hidden @ weight.T, labels, targets, **options).total, leaves)
    loss = fused.linear_kd_loss(hidden.bfloat16(), weight, labels, targets, chunk_size=256, **options)
    found = torch.autograd.grad(loss.total, leaves)
    yield {
        name: float((mine.float() - right).norm() / right.norm())
        for name, mine, right in zip(("hidden", "weight"), found, exact, strict=True)
    }


def narrowed(bench: Bench) -> PreTrainedModel:
    """35 % of its neurons taken away, whichever."""
    model = bench.model()
    kept, outputs = {}, {}
    for mlp in models.find_mlps(model):
        weight = models.linear_weight(model.get_submodule(mlp.output)).detach()
        kept[mlp] = torch.arange(round(0.65 * weight.shape[1] / 64) * 64)
        outputs[mlp] = weight[:, : len(kept[mlp])].clone()
    width.keep(model, kept, outputs, {})
    return model


def fine_tuning(model: PreTrainedModel, bench: Bench, size: int) -> dict[str, Any]:
    """The plainest good loop: autocast, fused AdamW, whole logits."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    batches = bench.tokens.to(bench.device).split(bench.batch)[:6]

    def step(batch: Tensor) -> None:
        for micro in batch.split(size):
            with torch.autocast(bench.device.type, torch.bfloat16):
                loss = model(input_ids=micro, labels=micro, use_cache=False).loss
            (loss * len(micro) / len(batch)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    times = [seconds(bench.device, lambda batch=batch: step(batch), 1)["median"] for batch in batches]
    return {
        "tokens_per_second": rate(batches[0].numel(), summary(times)),
        "peak_bytes": peak_device_memory_bytes(bench.device),
    }


def ours(student: PreTrainedModel, cache: Cache | None, bench: Bench, size: int) -> dict[str, Any]:
    """`distillation.train`, all of it: from the cache on disk, its first steps left out."""
    assert cache is not None
    blocks = list(bench.blocks().values())
    training_ids = np.arange(len(blocks) - 4)
    data = distillation.Data(blocks, lambda epoch: training_ids, range(len(blocks) - 4, len(blocks)), cache)
    settings: dict[str, Any] = {"batch_size": bench.batch, "micro_batch_size": size, "validations": 1}
    options = Distill(learning_rate=1e-6, precision="bfloat16", epochs=2, **settings)
    steps: list[Any] = []
    start = time.perf_counter()
    distillation.train(student, data, options, on_step=lambda step, count: steps.append(step))
    taken = time.perf_counter() - start
    times = [step.seconds for step in steps[len(steps) // 2 :]]  # of the second epoch
    return {
        "tokens_per_second": rate(bench.batch * bench.tokens.shape[1], summary(times)),
        "first_step_seconds": round(steps[0].seconds, 2),
        "whole_seconds": round(taken, 2),
        "losses": [round(step.loss, 4) for step in steps[:3]],
        "peak_bytes": peak_device_memory_bytes(bench.device),
    }


def agreement(bench: Bench) -> Rows:
    """Perplexity of the same weights in bfloat16 and in float32."""
    blocks = bench.tokens[:8]
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model: Any = bench.model()
        model.to(dtype)
        total = 0.0
        with torch.inference_mode():
            for block in blocks:
                logits = models.logits_of(model, input_ids=block[None].to(bench.device))[0, :-1]
                total += float(torch.nn.functional.cross_entropy(logits, block[1:].to(bench.device)))
        found[str(dtype).removeprefix("torch.")] = round(total / len(blocks), 5)
    yield found


FIGURES: dict[str, Callable[[Bench], Rows]] = {
    "gradients": gradients,
    "training": training,
    "structural": structural,
    "passes": passes,
    "agreement": agreement,
}

if __name__ == "__main__":
    main()
