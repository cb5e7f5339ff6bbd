"""`sparsekd run --dry-run --devices`: memory, the way to spread and time on devices that are not here."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import snapshot
from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config

from sparsekd.errors import UsageError
from sparsekd.recipe import load_recipe
from sparsekd.run import plan_devices
from sparsekd.run.devices import KNOWN, devices_named

MEASURED = Path(__file__).parents[2] / "benchmarks" / "results" / "gpu.jsonl"


def qwen3(hidden: int, inner: int, layers: int, heads: int, tied: bool) -> Qwen3Config:
    sizes: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    heads_of: dict[str, Any] = {"num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128}
    return Qwen3Config(vocab_size=151936, tie_word_embeddings=tied, **sizes, **heads_of)


def llama(hidden: int, inner: int, layers: int, heads: int) -> LlamaConfig:
    sizes: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    return LlamaConfig(vocab_size=128256, num_attention_heads=heads, num_key_value_heads=8, **sizes)


CONFIGS: dict[str, PreTrainedConfig] = {
    "0.6B": qwen3(1024, 3072, 28, 16, tied=True),
    "8B": llama(4096, 14336, 32, 32),
    "32B": qwen3(5120, 25600, 64, 64, tied=False),
    "70B": llama(8192, 28672, 80, 64),
}
# as it was measured: 35 % of the neurons taken out, steps of 16 blocks of 512
GPU = [
    *["compress.method=neurons", "compress.reduction=0.35", "compress.neurons.allocation=uniform"],
    *["compress.neurons.multiple=64", "corpus.seq_len=512", "distill.batch_size=16", "distill.micro_batch_size=16"],
]
LONG = "corpus.num_blocks=20000"  # long enough to be compiled


@pytest.fixture
def planned(tmp_path: Path) -> Any:
    """The plan for a size on some devices, as JSON has it."""

    def plan(size: str, devices: str, *changes: str) -> Any:
        folder = tmp_path / size
        CONFIGS[size].save_pretrained(folder)
        return plan_devices(load_recipe(str(folder), (*GPU, *changes)), devices).as_dict()

    return plan


@pytest.fixture
def auto_recipe(tiny_recipe: Path) -> Path:
    """The tiny recipe without the number formats in which the other tests compute."""
    recipe = yaml.safe_load(tiny_recipe.read_text())
    del recipe["model"]["dtype"], recipe["distill"]["precision"]
    tiny_recipe.write_text(yaml.safe_dump(recipe))
    return tiny_recipe


def rows(figure: str, **wanted: Any) -> dict[str, Any]:
    """The last row of what was measured on the H200."""
    every = [json.loads(line) for line in MEASURED.read_text().splitlines()]
    return [row for row in every if row["figure"] == figure and wanted.items() <= row.items()][-1]


@pytest.mark.parametrize(
    ("loop", "at_once", "blocks"),
    [
        ("ours, layers and loss compiled", 16, LONG),
        ("ours, not compiled", 16, "corpus.num_blocks=60"),
        ("ours, layers compiled", 4, LONG),
        ("ours, not compiled", 4, "corpus.num_blocks=60"),
    ],
)
def test_training_as_it_was_measured(loop: str, at_once: int, blocks: str, planned: Any) -> None:
    measured = rows("training", loop=loop, **{"at once": at_once})
    found = planned("0.6B", "1xH200", blocks, f"distill.micro_batch_size={at_once}")["stages"]["distill"]
    assert found["tokens_per_second"] == pytest.approx(measured["tokens_per_second"], rel=0.01)
    assert found["memory_bytes"]["one device"] == pytest.approx(measured["peak_bytes"], rel=0.25)
    assert found["fit"] == {
        "way": "one device",
        "devices": 1,
        "setting": None,
        "memory_bytes": found["memory_bytes"]["one device"],
    }


def test_layers_of_widths_of_their_own_are_compiled_only_in_a_longer_training(planned: Any) -> None:
    def speed(blocks: int, *changes: str) -> float:
        found = planned("0.6B", "1xH200", f"corpus.num_blocks={blocks}", *changes)
        return found["stages"]["distill"]["tokens_per_second"]

    own_widths = "compress.neurons.allocation=global"
    assert speed(20_000) == pytest.approx(speed(60_000, own_widths))
    assert speed(20_000, own_widths) == pytest.approx(speed(60))


def test_the_other_stages_as_they_were_measured(planned: Any) -> None:
    large = planned("0.6B", "1xH200", "cache.batch_size=16", "compress.num_tokens=32768", "compress.batch_size=4", LONG)
    passes, structural = rows("passes", **{"at once": 16}), rows("structural")
    recorded = passes["forward_tokens_per_second"] * passes["cache_without_hash_to_forward"]
    assert 1 / large["seconds_per_token"] == pytest.approx(passes["forward_tokens_per_second"], rel=0.01)
    assert large["stages"]["cache"]["tokens_per_second"] == pytest.approx(recorded, rel=0.01)
    assert large["stages"]["compress"]["seconds"] == pytest.approx(structural["compress_seconds"], rel=0.05)
    held = large["stages"]["compress"]["memory_bytes"]["one device"]
    assert held == pytest.approx(structural["peak_bytes"], rel=0.25)
    small = planned("0.6B", "1xH200", "cache.batch_size=4", LONG)
    forward = rows("passes", **{"at once": 4})["forward_tokens_per_second"]
    assert small["stages"]["cache"]["tokens_per_second"] == pytest.approx(forward, rel=0.01)


def test_a_device_half_as_fast_takes_twice_as_long(planned: Any) -> None:
    whole, half = planned("8B", "8x80GB:800", LONG), planned("8B", "8x80GB:400", LONG)
    assert half["seconds"] == pytest.approx({stage: 2 * seconds for stage, seconds in whole["seconds"].items()})
    assert half["stages"]["distill"]["fit"] == whole["stages"]["distill"]["fit"]


def test_what_is_divided_and_what_is_not(planned: Any) -> None:
    """Of the student's 16 bytes a parameter FSDP2 divides all; DDP has the gradients twice, in each copy."""
    flags = (LONG, "distill.gradient_checkpointing=true", "distill.batch_size=128", "distill.micro_batch_size=1")
    one, four, eight = (planned("8B", f"{n}xH200", *flags)["stages"]["distill"]["memory_bytes"] for n in (1, 4, 8))
    student = planned("8B", "1xH200")["compression"]["model_parameters_stored"]
    assert one.keys() == {"one device"} and four.keys() == {"one device", "DDP", "FSDP2"}
    assert four["DDP"] - one["one device"] == pytest.approx(4 * student)
    assert four["FSDP2"] - eight["FSDP2"] == pytest.approx(16 * student * (1 / 4 - 1 / 8))
    assert eight["FSDP2"] > 16 * student / 8 + 4 * 2 * 128256 * 4096  # embeddings and output are whole


def test_the_way_that_fits(planned: Any) -> None:
    flags = ("distill.batch_size=64", "distill.micro_batch_size=8", LONG)

    def fits(size: str, devices: str) -> dict[str, tuple[Any, ...]]:
        stages = planned(size, devices, *flags)["stages"].items()
        return {name: tuple(stage["fit"].values())[:3] for name, stage in stages}

    assert set(fits("0.6B", "8x80GB").values()) == {("DDP", 8, None), ("one device", 1, None)}
    assert fits("8B", "8xH100")["distill"] == ("FSDP2", 8, None)
    large = fits("32B", "8xH100")
    assert large["distill"] == ("FSDP2", 8, "distill.gradient_checkpointing=true")
    assert large["compress"] == ("DDP", 8, "compress.offload=true")
    assert fits("70B", "8xH100")["distill"] == ("FSDP2", 16, "distill.gradient_checkpointing=true")
    assert fits("70B", "1xH100")["cache"] == ("FSDP2", 2, None)


def test_what_fits_nowhere(planned: Any) -> None:
    """Embeddings and a layer of it are larger than the device, however many there are."""
    found = planned("70B", "8x2GB:10", LONG)
    assert found["stages"]["distill"]["fit"] is None and found["stages"]["distill"]["seconds"] is None
    assert "distill" not in found["seconds"]


def test_more_devices_than_blocks_in_a_step(planned: Any) -> None:
    flags = ("distill.batch_size=4", "distill.micro_batch_size=4", LONG)
    four, eight = planned("0.6B", "4xH100", *flags), planned("0.6B", "8xH100", *flags)
    assert four["note"] is None
    assert eight["note"] == "distill.batch_size is 4: of 8 devices only 4 have blocks all the time"
    assert eight["stages"]["distill"]["tokens_per_second"] == four["stages"]["distill"]["tokens_per_second"]
    assert eight["seconds"]["cache"] == pytest.approx(four["seconds"]["cache"] / 2)


def test_the_largest_takes_seconds(planned: Any) -> None:
    start = time.process_time()
    found = planned("70B", "8x80GB", LONG)
    assert time.process_time() - start < 5
    assert found["compression"]["model_parameters_before"] == 70_553_706_496


def test_json_has_what_the_dry_run_has(sparsekd: Any, auto_recipe: Path, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    here = sparsekd(
        "run", auto_recipe, "--dry-run", "--json", "--reduction", "0.4", "--set", "compress.method=neurons"
    ).json
    there = sparsekd(
        "run",
        auto_recipe,
        "--dry-run",
        "--json",
        "--reduction",
        "0.4",
        "--set",
        "compress.method=neurons",
        "--devices",
        "2xl40s",
    ).json
    assert list(there)[: len(here)] == list(here)
    assert there["seconds"].keys() == here["seconds"].keys()
    same = ("recipe", "compression", "cache_tokens", "cache")
    assert {key: there[key] for key in same} == {key: here[key] for key in same}
    assert there["devices"]["name"] == "L40S" and there["devices"]["memory_bytes"] == 48e9
    assert snapshot(tmp_path) == before


def test_what_is_printed(sparsekd: Any, auto_recipe: Path) -> None:
    outcome = sparsekd(
        "run", auto_recipe, "--dry-run", "--devices", "8x80GB", "--set", "compress.method=neurons", "--reduction", "0.4"
    )
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert "devices       8 x H100, 80 GB each, bfloat16" in lines
    (speed,) = [line for line in lines if line.startswith("speed")]
    assert "989 TFLOP/s by the data sheet of H100, which is taken since only 80 GB are given; 22% of it" in speed
    assert any(line.startswith("total         about ") for line in lines)
    assert "<- this recipe" in outcome.out and "down_proj" not in outcome.out
    unknown = sparsekd("run", auto_recipe, "--dry-run", "--devices", "1xL4", "--set", "compress.method=two-sided").out
    assert "not known" in unknown and "total" not in unknown
    online = sparsekd("run", auto_recipe, "--dry-run", "--devices", "1xL4", "--set", "distill.teacher=online").out
    assert "teacher cache none" in online


@pytest.mark.parametrize(
    ("devices", "said"),
    [
        ("8", "expected how many and which"),
        ("axb", "expected how many and which"),
        ("0x80GB", "expected how many and which"),
        ("-1x80GB", "expected how many and which"),
        ("8x80GB:", "expected how many and which"),
        ("8x80GB:0", "expected how many and which"),
        ("8xH100:500", "expected how many and which"),
        ("9999999xH100", "expected how many and which"),
        ("", "expected how many and which"),
        ("8xB9", "B9 is not known here; expected H100, "),
        ("8x0GB", "0GB is not known here"),
        ("8x64GB", "no known device has 64 GB; add its TFLOP/s, such as 8x64GB:312"),
    ],
)
def test_bad_devices(devices: str, said: str, refused: Any, auto_recipe: Path) -> None:
    line = refused("run", auto_recipe, "--dry-run", f"--devices={devices}", error=UsageError)
    assert line.startswith(f"sparsekd: --devices is {devices}: ") and said in line


def test_only_for_a_dry_run_in_bfloat16(refused: Any, auto_recipe: Path, tmp_path: Path) -> None:
    line = refused("run", auto_recipe, "--devices", "8xH100", "--out", tmp_path / "out", error=UsageError)
    assert line == "sparsekd: --devices only plans, for what is not here: give --dry-run with it"
    assert not (tmp_path / "out").exists()
    for setting in ("model.dtype=float32", "distill.precision=float32"):
        line = refused("run", auto_recipe, "--dry-run", "--devices", "8xH100", "--set", setting, error=UsageError)
        assert "is float32: set it to auto" in line


def test_names_and_sizes() -> None:
    for name, (memory, speed) in KNOWN.items():
        found = devices_named(f"3x{name}")
        assert (found.count, found.memory_bytes, found.flops) == (3, memory * 1e9, speed * 1e12)
    assert devices_named("8x80gb").name == "H100"
    assert devices_named("2x23.5GB:82.5").flops == 82.5e12
