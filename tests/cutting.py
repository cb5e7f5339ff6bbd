"""The structural step as the tests call it: with the options of the method among those that all methods have."""

from __future__ import annotations

from typing import Any

from sparsekd.compression import Calibration, Plan, apply, batches_of
from sparsekd.recipe import Compress, compress_section


def section(**options: Any) -> Compress:
    return compress_section(options)


def cut(model: Any, blocks: Any, options: Compress, **how: Any) -> Plan:
    calibration = Calibration(model, batches_of(blocks, options.batch_size), **how)
    return apply(model, lambda _: calibration, options)
