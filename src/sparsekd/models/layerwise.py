"""Run a decoder from any of its layers on, or one layer alone, whatever the architecture.

The model itself does the work: the layers that are not wanted hand their input on, and the first layer's input is
replaced by hidden states that were recorded before. Masks, position embeddings, the final norm and the output
projection stay the model's own, so no knowledge of its forward pass is needed.

Shape letters: B blocks, L positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsekd.models.anatomy import find_layers

Result = TypeVar("Result")


class Layers:
    """The decoder layers of a model, in depth order."""

    def __init__(self, model: PreTrainedModel):
        self.modules = find_layers(model)
        self._lengths: list[int | None] = [None] * len(self.modules)  # of the tuple a layer returns; None: a tensor

    def record(self, call: Callable[[], Any]) -> list[Float[Tensor, "B L H"]]:
        """What every layer reads while `call` runs the model, and what the last one writes."""
        hidden: list[Tensor] = []
        handles = []
        for number, layer in enumerate(self.modules):

            def on_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                hidden.append((args[0] if args else kwargs["hidden_states"]).detach())

            def on_output(_: nn.Module, __: Any, output: Any, number: int = number) -> None:
                self._lengths[number] = len(output) if isinstance(output, tuple) else None
                if number == len(self.modules) - 1:
                    hidden.append((output[0] if isinstance(output, tuple) else output).detach())

            handles.append(layer.register_forward_pre_hook(on_input, with_kwargs=True))
            handles.append(layer.register_forward_hook(on_output))
        try:
            call()
        finally:
            for handle in handles:
                handle.remove()
        return hidden

    def entering(self, call: Callable[[], Any]) -> Float[Tensor, "B L H"]:
        """What the first layer reads when `call` runs the model; no layer runs. `record` as for `run`."""
        found: list[Tensor] = []

        def on_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append((args[0] if args else kwargs["hidden_states"]).detach())

        handle = self.modules[0].register_forward_pre_hook(on_input, with_kwargs=True)
        try:
            with self._passing_on(list(range(len(self.modules)))):
                call()
        finally:
            handle.remove()
        return found[0]

    def run(
        self, call: Callable[[], Result], hidden: Float[Tensor, "B L H"], first: int, stop: int | None = None
    ) -> tuple[Result, Float[Tensor, "B L H"]]:
        """What `call`, which runs the model, returns when only layers [first, stop) run, layer `first` on `hidden`;
        and the output of the last of them. `record` must have seen the model before."""
        stop = len(self.modules) if stop is None else stop
        last: list[Tensor] = [hidden]

        def on_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        def on_output(_: nn.Module, __: Any, output: Any) -> None:
            last[0] = output[0] if isinstance(output, tuple) else output

        handles = [self.modules[0].register_forward_pre_hook(on_input, with_kwargs=True)]
        if first < stop:
            handles.append(self.modules[stop - 1].register_forward_hook(on_output))
        try:
            with self._passing_on([n for n in range(len(self.modules)) if not first <= n < stop]):
                return call(), last[0]
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _passing_on(self, numbers: list[int]) -> Iterator[None]:
        """These layers return their input, in the shape that their output has."""
        replaced = [self.modules[number].__dict__.get("forward") for number in numbers]  # an off-loading hook's, maybe
        for number in numbers:
            length = self._lengths[number]

            def forward(hidden_states: Tensor, *_: Any, length: int | None = length, **__: Any) -> Any:
                return hidden_states if length is None else (hidden_states, *[None] * (length - 1))

            self.modules[number].forward = forward
        try:
            yield
        finally:
            for number, original in zip(numbers, replaced, strict=True):
                del self.modules[number].forward
                if original is not None:
                    self.modules[number].forward = original
