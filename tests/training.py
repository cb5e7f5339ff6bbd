"""What trainings of the tests share: options, data, and the weights of two that are to be the same."""

import numpy as np
import torch
from transformers import PreTrainedModel

from sparsekd import distillation
from sparsekd.recipe import Distill
from sparsekd.teacher import Cache, Online

OPTIONS = Distill(batch_size=4, micro_batch_size=2, learning_rate=3e-3, epochs=2, validations=3, warmup_ratio=0.2)


def data(blocks: torch.Tensor, cache: Cache | Online, validation_ids: tuple[int, ...] = (12, 13)) -> distillation.Data:
    def order(epoch: int) -> np.ndarray:
        return np.random.Generator(np.random.Philox(key=[7, epoch])).permutation(12)

    return distillation.Data(list(blocks.numpy()), order, validation_ids, cache)


def state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())
