"""The command itself: quick to start, one line on an error, a verb for each file."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from sparsekd import __version__, cli, errors


def test_parsing_does_not_import_torch() -> None:
    code = "import sparsekd.cli, sys; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_each_file_with_a_command_is_a_verb() -> None:
    texts = {path.stem: path.read_text() for path in Path(cli.__file__).parent.glob("*.py")}
    verbs = {name for name, text in texts.items() if re.search(r"^(command =|def command\()", text, re.M)}
    assert verbs == {verb.name for verb in cli.app.registered_commands} and len(verbs) == 15


def test_help_takes_little_work() -> None:
    """The time of the processor, which does not depend on what else the machine does."""
    seconds = []
    for _ in range(5):
        before = os.times()
        done = subprocess.run([sys.executable, "-m", "sparsekd", "--help"], capture_output=True, text=True, check=True)
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(seconds) < 0.6, seconds
    listed = re.findall(r"^\W*([a-z]+)  ", done.stdout.partition("Commands")[2], re.M)
    assert listed == [verb.name for verb in cli.app.registered_commands]


def test_an_unknown_option_is_a_usage_error(sparsekd: Any, tiny_recipe: Path) -> None:
    outcome = sparsekd("run", tiny_recipe, "--no-such-option")
    assert outcome.code == errors.UsageError.exit_code
    assert "--no-such-option" in outcome.err
    assert "Traceback" not in outcome.err


def test_the_message_is_the_last_line(refused: Any, tiny_recipe: Path, tmp_path: Path, text_file: Path) -> None:
    text_file.write_text("")
    line = refused("run", tiny_recipe, "--out", tmp_path / "out", error=errors.DataError)
    assert "no text in it" in line


def test_the_version_is_that_of_the_package(sparsekd: Any) -> None:
    outcome = sparsekd("--version")
    assert (outcome.code, outcome.out) == (0, f"sparsekd {__version__}\n")
