"""What each process of `test_only_waiting_for_the_main_process_is_patient` runs, with a timeout of a second."""

import time
from datetime import timedelta

import torch
import torch.distributed as dist

from sparsekd.run import processes

processes._TIMEOUT = timedelta(seconds=1)
both = processes.Processes(torch.device("cpu"))


def slow() -> float:
    if both.is_main:
        time.sleep(3)
    return time.monotonic()


start = time.monotonic()
assert both.main_first(slow) > start + 2.5  # of the second process too, which waited longer than the timeout
if both.is_main:
    time.sleep(10)  # as one that hangs
else:
    try:
        dist.all_reduce(torch.ones(1))
    except RuntimeError:
        assert time.monotonic() < start + 8
    else:
        raise AssertionError("the hung process was not noticed")
