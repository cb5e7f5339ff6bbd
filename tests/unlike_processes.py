"""What each process of `test_processes_that_differ_are_refused` runs: in turns a recipe and a version of its own."""

import os
from typing import Any

import torch

from sparsekd.errors import UsageError
from sparsekd.recipe import load_recipe
from sparsekd.run import processes

all_of_them = processes.Processes(torch.device("cpu"))
mine, others = os.environ["RANK"] == "1", processes.versions()


def refused(expected: str, *overrides: str) -> None:
    try:
        all_of_them.require_alike(load_recipe("demo", overrides))
    except UsageError as error:
        assert expected in str(error), error
    else:
        raise AssertionError(f"not refused: {expected}")


def newer(**changed: Any) -> None:
    processes.versions = lambda: others | changed if mine else others


all_of_them.require_alike(load_recipe("demo", ("device=cpu",) if mine else ()))
newer(numpy="9.9")
all_of_them.require_alike(load_recipe("demo"))
refused(
    "process 1 has another recipe than process 0: distill.alpha is 0.25 there and 0.75 in process 0",
    f"distill.alpha={0.25 if mine else 0.75}",
)
newer(transformers="9.9")
refused("process 1 has another version than process 0: transformers is 9.9 there and ")

assert all_of_them.of_main(lambda: os.environ["RANK"]) == "0"  # what the main process measured holds for all
