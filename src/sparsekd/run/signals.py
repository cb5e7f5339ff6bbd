"""Signals that ask a run to stop: noted, and obeyed when the state is saved."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying at once; a second one takes the usual way. None in a thread, which
    gets no signals."""
    received: list[int] = []
    if not _is_main_thread():
        yield received
        return

    def handler(number: Any, frame: Any) -> None:
        if received:
            signal.signal(number, previous[number])
            os.kill(os.getpid(), number)
        received.append(number)

    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def ignore_stop() -> None:
    """For a process that ends anyway: SIGTERM does not cut short what it has to say."""
    if _is_main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
