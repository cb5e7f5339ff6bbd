"""What a run needs and takes on 1 to 8 GPUs, from 0.6B to 70B: the plan of `sparsekd run --dry-run --devices`.

    python benchmarks/plan_devices.py [--device 80GB]

No weights are read and nothing is measured here. The plan is set beside what was
measured on an H200 (results/gpu.jsonl). Writes results/plan_devices.json and prints the tables of docs/distill.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from _record import RESULTS, record
from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config

from sparsekd.recipe import Recipe, load_recipe
from sparsekd.report import tables
from sparsekd.run import plan_devices

COUNTS = (1, 2, 4, 8)
# 35 % of the neurons taken out; 100,000 blocks of 512 tokens are cached and learned once, in steps of 64
SETTINGS = [
    *["compress.method=neurons", "compress.reduction=0.35", "compress.num_tokens=131072"],
    *["corpus.seq_len=512", "corpus.num_blocks=100000", "corpus.num_validation_blocks=128", "cache.batch_size=8"],
    *["distill.batch_size=64", "distill.micro_batch_size=8", "evaluate.batch_size=4"],
]
# as it was measured
MEASURED = [
    *["compress.method=neurons", "compress.reduction=0.35", "compress.num_tokens=32768", "corpus.seq_len=512"],
    *["compress.neurons.allocation=uniform", "compress.neurons.multiple=64", "distill.batch_size=16"],
]
LONG, SHORT = "corpus.num_blocks=20000", "corpus.num_blocks=60"  # compiled, and not
LOOPS = [
    ("ours, layers and loss compiled", 16, LONG),
    ("ours, layers compiled", 16, LONG),
    ("ours, not compiled", 16, SHORT),
    ("ours, layers compiled", 4, LONG),
    ("ours, not compiled", 4, SHORT),
]


def qwen3(hidden: int, inner: int, layers: int, heads: int, tied: bool) -> PreTrainedConfig:
    sizes: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    heads_of: dict[str, Any] = {"num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128}
    return Qwen3Config(vocab_size=151936, tie_word_embeddings=tied, **sizes, **heads_of)


def llama(hidden: int, inner: int, layers: int, heads: int) -> PreTrainedConfig:
    sizes: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    return LlamaConfig(vocab_size=128256, num_attention_heads=heads, num_key_value_heads=8, **sizes)


MODELS = {
    "Qwen3-0.6B": qwen3(1024, 3072, 28, 16, tied=True),
    "Llama-3.1-8B": llama(4096, 14336, 32, 32),
    "Qwen3-32B": qwen3(5120, 25600, 64, 64, tied=False),
    "Llama-3-70B": llama(8192, 28672, 80, 64),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="80GB")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, config in MODELS.items():
            config.save_pretrained(Path(folder) / name)
            rows += [planned(name, f"{count}x{given.device}", recipe(folder, name, SETTINGS)) for count in COUNTS]
        beside = [compared(folder, *loop) for loop in LOOPS]
    record("plan_devices", {"settings": SETTINGS, "rows": rows, "beside_what_was_measured": beside}, show=False)
    show(rows)
    for row in beside:
        print(row)


def recipe(folder: str, name: str, settings: list[str]) -> Recipe:
    return load_recipe(str(Path(folder) / name), tuple(settings))


def planned(name: str, devices: str, wanted: Recipe) -> dict[str, Any]:
    found = plan_devices(wanted, devices).as_dict()
    kept = {key: found[key] for key in ("assumption", "note", "stages", "model_bytes", "cache_tokens")}
    sizes = {key: found["compression"][key] for key in ("model_parameters_before", "model_parameters_after")}
    cache = found["cache"][wanted.cache.codec]["bytes"]
    return {"model": name, "devices": devices} | sizes | {"cache_bytes": cache} | kept


def compared(folder: str, loop: str, at_once: int, blocks: str) -> dict[str, Any]:
    """A training on the H200 beside its plan."""
    every = [json.loads(line) for line in (RESULTS / "gpu.jsonl").read_text().splitlines()]
    wanted = {"figure": "training", "loop": loop, "at once": at_once}
    measured = [row for row in every if wanted.items() <= row.items()][-1]
    settings = [*MEASURED, blocks, f"distill.micro_batch_size={at_once}"]
    stage = plan_devices(recipe(folder, "Qwen3-0.6B", settings), "1xH200").stages["distill"]
    memory = stage.memory_bytes["one device"]
    found = {"planned_tokens_per_second": round(stage.tokens_per_second or 0), "planned_bytes": round(memory)}
    there = {"tokens_per_second": measured["tokens_per_second"], "peak_bytes": measured["peak_bytes"]}
    return (
        {"loop": loop, "at_once": at_once} | found | there | {"bytes_error": round(memory / there["peak_bytes"] - 1, 3)}
    )


def show(rows: list[dict[str, Any]]) -> None:
    """The table of the largest number of devices, and for every number what the training fits as."""
    print("| model | cache | " + " | ".join(f"{stage}" for stage in rows[0]["stages"]) + " | tokens/s | time |")
    print("|---|---|---|---|---|---|---|---|")
    for row in (row for row in rows if row["devices"].startswith(f"{COUNTS[-1]}x")):
        stages = row["stages"]
        total = sum(stage["seconds"] or 0.0 for stage in stages.values())
        cells = [f"{tables.size(stage['fit']['memory_bytes'])}, {fits(row, stage)}" for stage in stages.values()]
        speed = f"{stages['distill']['tokens_per_second']:,.0f}"
        print(
            "| "
            + " | ".join([row["model"], tables.size(row["cache_bytes"]), *cells, speed, tables.duration(total)])
            + " |"
        )
    for row in rows:
        stage = row["stages"]["distill"]
        each = tables.size(stage["fit"]["memory_bytes"])
        print(
            f"| {row['model']} | {row['devices']} | {fits(row, stage)} | {each} | {stage['tokens_per_second']:,.0f} |"
        )


def fits(row: dict[str, Any], stage: dict[str, Any]) -> str:
    return ", ".join(tables.devices({"stages": {"": stage}, "devices": {"count": int(row["devices"][0])}})[0][4:5])


if __name__ == "__main__":
    main()
