"""What each process of `test_several_processes_train_the_same_weights_as_one` runs: FOLDER, then what to call each
training; one that is called stopped is stopped and resumed."""

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

OPTIONS = Distill(batch_size=4, micro_batch_size=1, learning_rate=3e-3, epochs=2, validations=2, precision="float32")


def train(folder: Path, name: str, stop_at: int | None = None) -> None:
    """Of NAME-COUNT the first is the weighting."""
    student, _ = sparsekd.load(str(folder / "student"))
    cache, blocks = Cache(folder / "cache"), list(np.load(folder / "blocks.npy"))
    done = []
    history = distillation.train(
        student,
        distillation.Data(blocks, lambda epoch: np.arange(11), [11, 12, 13], cache, ["a", "b"] * 7),
        replace(OPTIONS, weighting=name.partition("-")[0]) if "-" in name else OPTIONS,
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


if __name__ == "__main__":
    for name in sys.argv[2:]:
        if name == "stopped":
            with contextlib.suppress(Stopped):
                train(Path(sys.argv[1]), name, stop_at=2)
        train(Path(sys.argv[1]), name)
