"""Processes that wait for each other, one that hangs, and some that are not alike."""

from datetime import timedelta

from launching import run_processes

from sparsekd.run import processes


def test_only_waiting_for_the_main_process_is_patient() -> None:
    assert timedelta(minutes=30) == processes._TIMEOUT
    run_processes("waiting_processes.py", count=2)


def test_processes_that_differ_are_refused() -> None:
    run_processes("unlike_processes.py", count=3)
