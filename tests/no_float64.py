"""A device without float64, as Apple's GPUs are, whose tensors are really on the host; and sparsekd's command on it,
several of them with a plus between.

    python tests/no_float64.py run RECIPE --set device=single + inspect RECIPE

Its tensors refuse float64, and tensors of the host beside them. It takes a process of its own: torch cannot forget a
device. It has no autocast, and weights cannot be moved to it through `.data`, as `compress.offload` does.
"""

import sys
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

DEVICE = "single"
BETWEEN_DEVICES = {"_to_copy", "copy_"}


class OnDevice(torch.Tensor):
    """A tensor of the device; `raw` is where its numbers are."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> "OnDevice":
        if raw.dtype == torch.float64:
            raise TypeError(f"{DEVICE} has no float64")
        strides, start = raw.stride(), raw.storage_offset()
        made = torch.Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=strides, storage_offset=start, dtype=raw.dtype, device=f"{DEVICE}:0"
        )
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(operation, args, kwargs or {})

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def storage(self) -> Any:  # by which transformers sees what is tied
        return self.raw.storage()


class FromNumbers(TorchFunctionMode):
    """Makes tensors of numbers on the host first: torch would ask a device for memory, which ours does not have."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if function is torch.tensor and options.get("device") is not None:
            device = options.pop("device")
            return function(*args, **options).to(device)
        return function(*args, **options)


class Module(_DummyBackendModule):
    """What `torch.autocast` asks a device for."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def computed(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation on the raw tensors; its result is where it was asked for, else where the inputs are."""
    if operation._can_decompose():  # inference mode leaves it whole
        return operation.decompose(*args, **kwargs)
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    name = operation.overloadpacket.__name__
    if ours and name not in BETWEEN_DEVICES and any(t.ndim and not isinstance(t, OnDevice) for t in tensors):
        raise RuntimeError(f"{name}: expected all tensors on {DEVICE}")
    asked = kwargs.get("device")
    stays = bool(ours) if asked is None else torch.device(asked).type == DEVICE
    if asked is not None:
        kwargs = kwargs | {"device": "cpu"}
    found = operation(*tree_map(_raw, args), **tree_map(_raw, kwargs))
    known = {id(tensor.raw): tensor for tensor in ours}  # what works in place returns what it was given

    def placed(value: Any) -> Any:
        if not stays or not isinstance(value, torch.Tensor):
            return value
        return known[id(value)] if id(value) in known else OnDevice(value)

    return tree_map(placed, found)


def _raw(value: Any) -> Any:
    return value.raw if isinstance(value, OnDevice) else value


if __name__ == "__main__":
    from sparsekd import cli, device

    _setup_privateuseone_for_python_backend(DEVICE, backend_module=Module())
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda operation, *args, **kwargs: computed(operation, args, kwargs), "PrivateUse1")
    device.WITHOUT_FLOAT64.add(DEVICE)
    commands = "\0".join(sys.argv[1:]).split("\0+\0")
    with FromNumbers():
        for command in commands:
            sys.argv[1:] = command.split("\0")
            try:
                cli.main()
            except SystemExit as ended:
                if ended.code:
                    raise
