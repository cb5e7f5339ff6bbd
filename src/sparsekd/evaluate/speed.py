"""How fast models read a prompt, side by side.

Measured in turns, so that what else the machine does falls on all of them; a ratio of two is what to quote.
"""

from __future__ import annotations

import statistics
import time

import torch
from transformers import PreTrainedModel

from sparsekd.records import Record

BLOCKS, LENGTH = 4, 128  # of a pass
_PASSES = 7  # of each model, after one that is not counted


@torch.inference_mode()
def prefill(models: dict[str, PreTrainedModel]) -> Record:
    """Seconds of a forward pass through the layers over `BLOCKS` blocks of `LENGTH` tokens, the median of seven, by the
    name of the model; the output projection, which a prompt needs once, is left out."""
    tokens = torch.arange(BLOCKS * LENGTH).reshape(BLOCKS, LENGTH) % 251  # which ones they are costs nothing
    taken: dict[str, list[float]] = {name: [] for name in models}
    for number in range(1 + _PASSES):
        for name, model in models.items():
            start = time.perf_counter()
            model.get_decoder()(input_ids=tokens.to(model.device), use_cache=False)
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            if number:
                taken[name].append(time.perf_counter() - start)
    return {"blocks": BLOCKS, "length": LENGTH, "seconds": {name: statistics.median(t) for name, t in taken.items()}}
