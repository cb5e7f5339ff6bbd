"""What the README and the pages say exists: verbs, options, files and public names."""

import re
from pathlib import Path

import pytest
from typer.main import get_command

import sparsekd
from sparsekd import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += [ROOT / "benchmarks" / "results" / "README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_options_exist(page: Path) -> None:
    verbs = get_command(cli.app).commands  # type: ignore[attr-defined]
    for verb, rest in re.findall(r"(?m)^ *sparsekd ([a-z]+)\b(.*)$", page.read_text(encoding="utf-8")):
        assert verb in verbs
        known = {name for parameter in verbs[verb].params for name in parameter.opts} | {"--help"}
        assert set(re.findall(r"--[a-z-]+", rest.partition("#")[0])) <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), target
    for target in re.findall(r"`((?:benchmarks|examples|recipes|docs|src|tests)/[\w./-]+\.\w+)`", text):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_public_names_exist(page: Path) -> None:
    for name in re.findall(r"\bsparsekd\.(?!json\b)([a-z_]+)\b", page.read_text(encoding="utf-8")):
        assert name in {*sparsekd.__all__, "cli"}, name
