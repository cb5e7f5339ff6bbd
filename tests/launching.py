"""Processes that find each other, as a launcher starts them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


def run_processes(script: str, *arguments: str, count: int) -> None:
    """Runs a script of this folder in processes that find each other, as a launcher would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
    processes = [
        subprocess.Popen(
            command,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    for process in processes:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error


def split_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets processes split their models, as `accelerate launch --use_fsdp --fsdp_version 2` does."""
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}.items():
        monkeypatch.setenv(name, value)
