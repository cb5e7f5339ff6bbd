"""`sparsekd distill`: killed at any moment, called again."""

from pathlib import Path
from typing import Any

import pytest

from sparsekd import files


@pytest.mark.parametrize("kept", [1, 2, 3, 4, 5])
def test_fresh_killed_at_any_removal_can_be_called_again(
    kept: int, sparsekd: Any, tiny_recipe: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """The removals are counted, and the process 'dies' at one of them; the next call finishes, with nothing stale."""
    out = tmp_path / "out"
    assert sparsekd("distill", tiny_recipe, "--out", out).code == 0
    remove, seen = files.remove, []

    def dies(path: Path) -> None:
        seen.append(path)
        if len(seen) == kept:
            raise KeyboardInterrupt
        remove(path)

    with monkeypatch.context() as patched:
        patched.setattr(files, "remove", dies)
        assert sparsekd("distill", tiny_recipe, "--out", out, "--fresh").code == 130
    assert sparsekd("distill", tiny_recipe, "--out", out).code == 0
    assert not list(out.glob("*.tmp-*"))
