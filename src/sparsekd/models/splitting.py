"""A model split over the processes that were started together: FSDP2, where accelerate's settings ask for it.

Each process has read the whole model into its host's memory and keeps its part of every matrix on its device. A pass
puts one decoder layer together at a time, beside what is in no layer: embeddings, last norm, output projection.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
import torch.distributed.checkpoint
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from sparsekd.device import memory_named, rank_and_count
from sparsekd.errors import ResourceError, UsageError
from sparsekd.models.anatomy import find_layers

_WAY_OUT = (
    "each device has to hold one decoder layer, the embeddings and the output projection whole: lower the batch size, "
    "or take devices with more memory"
)


def is_split() -> bool:
    """Whether models are split, as `accelerate launch --use_fsdp --fsdp_version 2` asks for; one process never does.
    Raises `UsageError` for the first version of FSDP, `ResourceError` for a PyTorch that is too old."""
    if rank_and_count()[1] == 1 or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UsageError("FSDP version 1 is not supported: give accelerate launch --fsdp_version 2")
    if not hasattr(torch.distributed.checkpoint, "HuggingFaceStorageWriter"):  # for checkpoints in parts
        raise ResourceError(f"FSDP needs a newer PyTorch than {torch.__version__}: it was tested with 2.13")
    # of transformers, which would leave the weights of all processes but the main one empty
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    return True


def split(model: PreTrainedModel, module: nn.Module | None = None) -> None:
    """Splits a model over all processes, in place; passes go through `module`, by default the model itself.

    Raises `UsageError` for a model that FSDP cannot split, `ResourceError` where a device is too small for a layer.
    """
    what, module = type(model).__name__, model if module is None else module
    with memory_named(lambda: f"splitting {what}", _WAY_OUT):
        try:
            for unit in (*find_layers(model), module):
                fully_shard(unit, mesh=_mesh(), reshard_after_forward=True)
        except (ValueError, NotImplementedError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"{what} cannot be split by FSDP: {reason}; start it without FSDP") from error
    forward = module.forward

    @functools.wraps(forward)
    def final(*args: Any, **kwargs: Any) -> Any:
        """The other processes wait in the middle of the pass: memory that ran out ends it, a smaller try can't."""
        with memory_named(lambda: f"a pass of {what}, which is split over {rank_and_count()[1]} processes", _WAY_OUT):
            return forward(*args, **kwargs)

    module.forward = final


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or what it is a part of; all processes must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@functools.cache
def _mesh() -> DeviceMesh:
    own: Any = PartialState().device
    return init_device_mesh(own.type, (rank_and_count()[1],))
