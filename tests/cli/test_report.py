"""`sparsekd report`: a finished run once more."""

import re
from pathlib import Path
from typing import Any

from sparsekd import errors, records


def test_the_memory_of_a_device_is_beside_the_host_s(
    sparsekd: Any, tiny_recipe: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr("sparsekd.run.stage.peak_device_memory_bytes", lambda device: 3_000_000_000)
    printed = sparsekd("run", tiny_recipe, "--out", out)
    assert printed.code == 0, printed.err
    assert re.search(r"^peak memory \d+\.\d GB host, 3\.0 GB device$", printed.out, re.M)
    assert "GB host, 3.0 GB device." in (out / "report.html").read_text()
    for path in out.rglob("stage.json"):  # as a run on a CPU, or one of an older version, has it
        summary = records.read(path)
        assert summary.pop("peak_device_memory_bytes") == 3_000_000_000
        records.write(path, summary)
    printed = sparsekd("report", out)
    assert re.search(r"^peak memory \d+\.\d GB$", printed.out, re.M)
    assert "GB device" not in (out / "report.html").read_text()


def test_a_folder_that_holds_no_run_has_no_report(refused: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    refused("report", tmp_path, error=errors.DataError)
