"""A model's decoder layers, one after the other, over all blocks: what a layer's neurons are, and what it hands on.

Nothing of a layer is kept when its turn is over but the hidden states that the next one reads, so that of statistics of
intermediate size those of one layer are in memory.

Shape letters: B blocks, L positions, N tokens, H hidden size, I neurons, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from sparsekd.compression.statistics import all_but_layers_on
from sparsekd.device import add_over_processes, fast_products, rank_and_count
from sparsekd.models import Layers, document_inputs, find_mlps, logits_of


class Walk:
    """This process's share of the batches on their way through the layers; `hidden` is what the next layer reads."""

    hidden: list[Float[Tensor, "B L H"]]

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Iterable[Int[Tensor, "_ _"]],
        device: torch.device | None = None,
        separator: int | None = None,
    ):
        """`device` and `separator` as in `statistics.collect`."""
        self.model, self.device, self._home = model, device or model.device, model.device
        self._layers, self._mlps = Layers(model), find_mlps(model)
        self.layers = range(len(self._layers.modules))  # their numbers
        rank, world = rank_and_count()
        own = [batch for number, batch in enumerate(batches) if number % world == rank]
        self._inputs = [document_inputs(batch.to(self.device), separator) for batch in own]
        with self._other_parts():
            if own:
                short = {name: value[:1, :2] for name, value in self._inputs[0].items()}
                self._layers.record(lambda: self._decode(short))
            self.hidden = [self._layers.entering(lambda inputs=inputs: self._decode(inputs)) for inputs in self._inputs]

    def copy(self) -> Walk:
        """Another walk from where this one is."""
        other: Any = Walk.__new__(Walk)
        vars(other).update(vars(self) | {"hidden": list(self.hidden)})
        return other

    def look(self, layer: int) -> Iterator[tuple[Float[Tensor, "N I"], Float[Tensor, "N H"]]]:
        """The neurons of a layer's MLP and the layer's output, a batch at a time; `hidden` stays what it was."""
        for neurons, after in self._outputs(layer):
            yield neurons.flatten(0, -2).float(), after.flatten(0, -2).float()

    def step(self, layer: int) -> Iterator[tuple[Float[Tensor, "N I"], Float[Tensor, "N H"]]]:
        """As `look`; batch by batch `hidden` becomes what the layer hands on."""
        for number, (neurons, after) in enumerate(self._outputs(layer)):
            self.hidden[number] = after  # in its place: a list beside this one would be all of the text once more
            yield neurons.flatten(0, -2).float(), after.flatten(0, -2).float()

    def pass_through(self, layer: int) -> None:
        """`hidden` becomes what the layer hands on."""
        for _ in self.step(layer):
            pass

    def kl_of(self, others: Sequence[Walk]) -> list[float]:
        """The KL of the distributions that the model makes of the hidden states of each of the others, to those that it
        makes of these: the mean over all positions of all processes, in nats. No layer runs."""
        sums = torch.zeros(len(others) + 1, dtype=torch.float64)
        with self._other_parts():
            for batch, hidden in enumerate(self.hidden):
                for row in range(len(hidden)):  # logits are large
                    log_p = self._log_probabilities(batch, row)
                    p = log_p.exp()
                    sums[-1] += len(p)
                    for number, other in enumerate(others):
                        log_q = other._log_probabilities(batch, row)
                        sums[number] += log_q.sub_(log_p).mul_(p).sum().neg().cpu()  # in place: they are large
        add_over_processes(sums)
        return (sums[:-1] / sums[-1]).tolist()

    def _log_probabilities(self, batch: int, row: int) -> Float[Tensor, "L V"]:
        inputs = {name: value[row : row + 1] for name, value in self._inputs[batch].items()}

        def logits() -> Tensor:
            with torch.no_grad(), fast_products(self.device):
                return logits_of(self.model, **inputs)

        found, _ = self._layers.run(logits, self.hidden[batch][row : row + 1], len(self.layers))
        return found[0].float().log_softmax(-1)

    def _outputs(self, layer: int) -> Iterator[tuple[Tensor, Tensor]]:
        with self._visiting(layer):
            for inputs, hidden in zip(self._inputs, self.hidden, strict=True):
                yield self._seen(layer, inputs, hidden)

    def _seen(self, layer: int, inputs: dict[str, Tensor], hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The neurons and the output of one batch. The hook is gone before the caller goes on: another walk may run the
        same layer in between."""
        seen: list[Tensor] = []
        output = self.model.get_submodule(self._mlps[layer].output)
        handle = output.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            after = self._run(layer, inputs, hidden)
            return seen[0], after
        finally:
            handle.remove()

    def adds_its_mlp(self, layer: int) -> bool:
        """Whether the layer's output is its MLP's with something added: where a norm comes between, it is not."""
        output = self.model.get_submodule(self._mlps[layer].output)
        inputs, hidden = ({k: v[:1] for k, v in self._inputs[0].items()}, self.hidden[0][:1])
        with self._visiting(layer):
            before = self._run(layer, inputs, hidden)
            moved = before.abs().median() * torch.linspace(-1, 1, before.shape[-1], device=before.device)
            handle = output.register_forward_hook(lambda _, __, value: value + moved.to(value))
            try:
                after = self._run(layer, inputs, hidden)
            finally:
                handle.remove()
        found = (after - before).flatten(0, -2).float().median(0).values  # a few positions may be too large to see it
        return bool(torch.cosine_similarity(found, moved.float(), dim=0) > 0.99)

    def _run(self, layer: int, inputs: dict[str, Tensor], hidden: Float[Tensor, "B L H"]) -> Float[Tensor, "B L H"]:
        return self._layers.run(lambda: self._decode(inputs), hidden, layer, layer + 1)[1]

    def _decode(self, inputs: dict[str, Tensor]) -> None:
        with torch.no_grad(), fast_products(self.device):
            self.model.get_decoder()(**inputs, use_cache=False)

    def _other_parts(self) -> Any:
        return all_but_layers_on(self.model, self._layers, self.device)

    @contextmanager
    def _visiting(self, number: int) -> Iterator[None]:
        """The layer is on the device of the walk, and so is all that is no layer."""
        layer = self._layers.modules[number]
        with self._other_parts():
            layer.to(self.device)
            try:
                yield
            finally:
                layer.to(self._home)
