"""What each width of each MLP is predicted to cost."""

import copy
from typing import Any

import numpy as np
import pytest
import torch

from sparsekd import compression, models
from sparsekd.compression import damage
from sparsekd.recipe.reading import compress_section


def calibration(model: Any) -> compression.Calibration:
    blocks = torch.randint(0, 300, (40, 32), generator=torch.Generator().manual_seed(1))
    return compression.Calibration(model, compression.batches_of(blocks, 4))


@pytest.mark.parametrize("multiple", [2, 24])
@pytest.mark.parametrize("architecture", ["llama", "phi3", "gpt2"])
def test_curves_rise_and_end_at_the_plan(architecture: str, multiple: int, make_model: Any) -> None:
    model = make_model(architecture)
    before = models.weights_hash(model)
    for allocation in ("global", "uniform"):
        section = compress_section(
            {"method": "neurons", "reduction": 0.35, "multiple": multiple, "allocation": allocation}
        )
        found = compression.damage_of(model, calibration(model), section)
        assert models.weights_hash(model) == before
        narrow = copy.deepcopy(model)
        plan = compression.apply(narrow, lambda _, model=narrow: calibration(model), section)
        lines = {line.name: line for line in plan.matrices}
        for one in found:
            assert one.neurons == models.shape(model.get_submodule(one.name))[0]
            assert one.kept == [*range(0, one.neurons, multiple), one.neurons]
            assert one.predicted_kl[-1] == 0 and (np.diff(one.predicted_kl) < 0).all()
            width = one.neurons_by_allocation[allocation]
            assert width == lines[one.name].neurons == models.shape(narrow.get_submodule(one.name))[0]
            at = one.predicted_kl[one.kept.index(width)]
            assert one.predicted_kl_by_allocation[allocation] == at == lines[one.name].predicted_kl
        plain = damage.as_dict(found, section)
        assert plain["predicted_kl_by_allocation"] == plan.predicted_kl_by_allocation
        assert plain["predicted_kl_by_allocation"][allocation] == plan.predicted_kl
    both = plain["predicted_kl_by_allocation"]
    assert both["global"] <= both["uniform"]
