"""What each process of `test_several_processes_train_the_same_weights_as_one` runs: FOLDER, then what to call each
training; one that is called stopped is stopped and resumed, of NAME-COUNT the first is the weighting."""

import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

import sparsekd
from sparsekd import distillation
from sparsekd.errors import Stopped
from sparsekd.recipe import Distill
from sparsekd.teacher.cache import Cache

folder, names = Path(sys.argv[1]), sys.argv[2:]
blocks = np.load(folder / "blocks.npy")
data = distillation.Data(
    list(blocks), lambda epoch: np.arange(11), [11, 12, 13], Cache(folder / "cache"), ["a", "b"] * 7
)
options = Distill(batch_size=4, micro_batch_size=1, learning_rate=3e-3, epochs=2, validations=2)


def train(name: str, stop_at: int | None = None) -> None:
    student, _ = sparsekd.load(str(folder / "student"))
    done = []
    history = distillation.train(
        student,
        data,
        replace(options, weighting=name.partition("-")[0]) if "-" in name else options,
        folder=folder / f"training-{name}",
        on_step=lambda step, _: done.append(step.step),
        stop_signal=lambda: 15 if done[-1] == stop_at else None,
    )
    save_file(distillation.on_host(student.state_dict()), folder / f"{name}.safetensors")
    curves = {
        "losses": [step.loss for step in history.steps],
        "validations": [validation.loss for validation in history.validations],
    }
    (folder / f"{name}.json").write_text(json.dumps(curves))


for name in names:
    if name == "stopped":
        with contextlib.suppress(Stopped):
            train(name, stop_at=2)
    train(name)
