"""`sparsekd doctor`: what is here."""

import sys
from typing import Any


def test_doctor(sparsekd: Any) -> None:
    facts = sparsekd("doctor", "--json").json
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["sparsekd"] != "not installed"
    assert facts["device"].startswith(("cpu, float32", "cuda, ", "mps, "))
    assert facts["free disk here"].endswith(" GB")
    assert facts["package gguf"] in ("installed", "missing (for: gguf)")
    assert "free disk here" in sparsekd("doctor").out
