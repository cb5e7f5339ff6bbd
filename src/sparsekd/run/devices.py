"""Devices that are not here, as 8xH100, and how fast a run goes on them.

Speed is that of a vendor's data sheet times the share of it that was measured on one H200 (docs/experiments/gpu.md).
Time between devices is not counted.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from sparsekd.distillation import worker
from sparsekd.errors import UsageError
from sparsekd.run.costs import Costs

# By name: GB of memory, and dense bfloat16 TFLOP/s of NVIDIA's data sheets, which for most give the double for sparse
# matrices. Of devices with the same memory, the first is meant where only the memory is given.
KNOWN = {
    "H100": (80, 989),
    "H200": (141, 989),
    "A100-80GB": (80, 312),
    "A100-40GB": (40, 312),
    "L40S": (48, 362),
    "RTX4090": (24, 165),
    "L4": (24, 121),
}

# Measured on an H200, of 989 TFLOP/s, with a Qwen3-0.6B and 16 blocks of 512 tokens at once: 6 x 502,464,512 parameters
# x 72,134 tokens/s in training with layers and loss compiled, x 40,525 not compiled; 2 x 596,049,920 x 176,855 in the
# forward pass.
COMPILED, NOT_COMPILED, FORWARD = 0.220, 0.1235, 0.213
# With 4 blocks at once the host's launches took all the time, for each of the 28 layers: at 23,086, 13,256 and 51,863
# tokens/s. No pass over a layer can be quicker.
_LAUNCHES_COMPILED, _LAUNCHES, _LAUNCHES_FORWARD = (2048 / speed / 28 for speed in (23_086, 13_256, 51_863))
# Of a token in the cache: recording went at 0.397 times the forward pass of 16 blocks, and was hidden behind that of 4.
_RECORDING = 1 / (0.397 * 176_855)
# Solving in float64, so that taking out 35 % of its neurons comes to the 20.6 s that it took. Low-rank methods have no
# such share: two-sided took 128 s with SmolLM2-135M, nearly all for decompositions of small matrices.
_SOLVER_EFFICIENCY = 1.18e-4


@dataclass(frozen=True)
class Devices:
    """Equal devices."""

    count: int
    name: str | None  # one of `KNOWN`; None where the speed was given
    memory_bytes: float  # of each
    flops: float  # floating point operations a second of each in bfloat16, by the data sheet
    source: str  # of the speed


def devices_named(text: str) -> Devices:
    """Of `8xH100`, `8x80GB` or `8x80GB:312`: how many, and which, or memory and dense bfloat16 TFLOP/s of each.

    Raises `UsageError` for anything else, for a device that is not known, and for a memory that no known device has.
    """
    form = re.fullmatch(r"([1-9]\d{0,5})x([\w.-]+)(?::(\d{1,5}(?:\.\d{1,3})?))?", text, re.ASCII)
    size = form and re.fullmatch(r"([1-9]\d{0,5}(?:\.\d{1,3})?)GB", form[2], re.IGNORECASE)
    if form is None or (form[3] is not None and (size is None or not float(form[3]))):
        raise UsageError(
            f"--devices is {text}: expected how many and which, such as 8xH100, 8x80GB or 8x80GB:312 (TFLOP/s)"
        )
    count = int(form[1])
    if size is None:
        name = next((known for known in KNOWN if known.lower() == form[2].lower()), None)
        if name is None:
            raise UsageError(
                f"--devices is {text}: {form[2]} is not known here; expected {', '.join(KNOWN)}, or memory and TFLOP/s "
                "such as 8x80GB:312"
            )
        memory, speed = KNOWN[name]
        return Devices(count, name, memory * 1e9, speed * 1e12, f"{speed} TFLOP/s by the data sheet of {name}")
    memory = float(size[1])
    if form[3] is not None:
        return Devices(count, None, memory * 1e9, float(form[3]) * 1e12, f"{form[3]} TFLOP/s as given")
    name = next((known for known, (has, _) in KNOWN.items() if has == memory), None)
    if name is None:
        raise UsageError(f"--devices is {text}: no known device has {size[1]} GB; add its TFLOP/s, such as {text}:312")
    speed = KNOWN[name][1]
    source = f"{speed} TFLOP/s by the data sheet of {name}, which is taken since only {size[1]} GB are given"
    return Devices(count, name, memory * 1e9, speed * 1e12, source)


class Speed:
    """How long the stages of some costs take on some devices."""

    def __init__(self, costs: Costs, devices: Devices):
        self._costs, self._devices = costs, devices

    def forward(self, at_once: int, share: float = 1.0) -> float:
        """Seconds for each of the tokens that go through a share of the dense model `at_once`, on one device."""
        sizes, flops = self._costs.sizes, self._devices.flops
        return max(2 * share * sizes.multiplied / (flops * FORWARD), sizes.layers * _LAUNCHES_FORWARD / at_once)

    def _training(self, at_once: int) -> float:
        """The same of the smaller model, forward and back."""
        costs, distill = self._costs, self._costs.recipe.distill
        num_tokens = distill.epochs * costs.recipe.corpus.num_blocks * costs.recipe.corpus.seq_len
        allocations = {getattr(step.options, "allocation", "uniform") for step in costs.recipe.compress.steps}
        # layers of their own widths or ranks are compiled each by itself
        kinds = 1 if allocations == {"uniform"} else costs.sizes.layers
        compiled = num_tokens >= worker.compiled_from("cuda", kinds) and not distill.gradient_checkpointing
        used, launches = (COMPILED, _LAUNCHES_COMPILED) if compiled else (NOT_COMPILED, _LAUNCHES)
        passes = 4 / 3 if distill.gradient_checkpointing else 1.0  # forward again
        products = 6 * costs.remaining * costs.sizes.multiplied / (self._devices.flops * used)
        return passes * max(products, costs.sizes.layers * launches / at_once)

    def of_stage(self, name: str) -> tuple[float | None, float | None]:
        """Tokens a second, of all devices, and seconds of a stage, where they are known."""
        recipe, work, count = self._costs.recipe, self._costs.work, self._devices.count
        seq_len, distill, remaining = recipe.corpus.seq_len, recipe.distill, self._costs.remaining
        if name == "cache":
            token = max(self.forward(recipe.cache.batch_size * seq_len), _RECORDING) / count
            return 1 / token, token * work.cached
        if name == "compress":
            if work.solver_flops and recipe.compress.method != "neurons":
                return None, None
            token = self.forward(recipe.compress.batch_size * seq_len) / count
            solver = work.solver_flops / (self._devices.flops * _SOLVER_EFFICIENCY)  # each process solves for itself
            return None, token * work.calibrated + solver
        if name == "evaluate":
            at_once = recipe.evaluate.batch_size * recipe.evaluate.context
            token = self.forward(at_once)
            return 1 / token, token * work.evaluated + self.forward(at_once, remaining) * work.evaluated_smaller
        at_once = min(distill.micro_batch_size, math.ceil(distill.batch_size / count)) * seq_len
        busy = distill.batch_size / math.ceil(distill.batch_size / count)
        asked = self.forward(seq_len) if distill.teacher == "online" else 0.0
        token = (self._training(at_once) + asked) / busy
        validated = (self.forward(at_once, remaining) + asked) / busy
        return 1 / token, token * work.trained + validated * work.validated
