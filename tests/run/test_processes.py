"""Processes that wait for each other, and one that hangs."""

from datetime import timedelta

from launching import run_processes

from sparsekd.run import processes


def test_only_waiting_for_the_main_process_is_patient() -> None:
    assert timedelta(minutes=30) == processes._TIMEOUT
    run_processes("waiting_processes.py", count=2)
