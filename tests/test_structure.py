"""The code's shape: who may import whom, how large a file may grow, and what never appears in it."""

import ast
import re
from pathlib import Path

import pytest

import sparsekd

PACKAGE = Path(sparsekd.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
FLOOR = {"errors", "files", "records", "names", "recipe", "device", "console"}
WITHOUT_TRANSFORMERS = {
    "errors",
    "files",
    "records",
    "names",
    "recipe",
    "cache",
    "codecs",
    "losses",
    "layers",
    "sources",
}
WITHOUT_TORCH = {"errors", "files", "records", "names", "recipe", "console", "cli", "__init__", "sources"}


def module(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imported(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=module)
def test_dependencies_point_down(path: Path) -> None:
    name, names = module(path), imported(path)
    tops = {other.split(".")[1] for other in names if other.startswith("sparsekd.")}
    if name not in {"cli", "__main__"}:
        assert "cli" not in tops
    if name in FLOOR:
        assert tops <= FLOOR
    if name not in {"cli", "pipeline"} and not name.startswith("reproduce"):
        assert "pipeline" not in tops or name == "__init__"
    if name in WITHOUT_TRANSFORMERS:
        assert not any(other.split(".")[0] == "transformers" for other in names)
    if name in WITHOUT_TORCH:
        assert not any(other.split(".")[0] == "torch" for other in imported(path, top_level_only=True))


@pytest.mark.parametrize("path", FILES, ids=module)
def test_files_stay_small_and_ascii(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 600
    assert text.isascii()
    assert ast.get_docstring(ast.parse(text)), "every module says what it is"


@pytest.mark.parametrize("path", FILES, ids=module)
def test_no_pickle_no_eval_and_one_place_that_writes(path: Path) -> None:
    text = path.read_text()
    forbidden = {"pickle", "dill", "joblib", "marshal", "shelve"}
    assert not forbidden & {name.split(".")[0] for name in imported(path)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"eval", "exec", "torch.load", "torch.save", "yaml.load"}
            if module(path) != "files":
                assert not re.search(r"\.write_(text|bytes)$", called) or called.startswith("files.")


def test_public_names_are_there() -> None:
    for name in sparsekd.__all__:
        assert getattr(sparsekd, name) is not None
    with pytest.raises(AttributeError, match="no attribute"):
        _ = sparsekd.nothing
