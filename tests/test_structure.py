"""The code's shape: who may import whom, how large a file may grow, and what never appears in it."""

import ast
import re
import statistics
from pathlib import Path

import pytest

import sparsekd

PACKAGE = Path(sparsekd.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# Each folder, or file beside the folders, may import what stands before it in this list, and nothing after it.
ORDER = [
    *["errors", "files", "records", "console", "device", "recipe", "corpus", "models", "teacher", "distillation"],
    *["compression", "evaluate", "run", "report", "export", "bench", "pipeline", "reproduce", "cli"],
]
WITHOUT_TRANSFORMERS = {
    "errors",
    "files",
    "records",
    "recipe",
    "teacher.cache",
    "teacher.codecs",
    "teacher.merging",
    "teacher.selecting",
    "teacher.shards",
    "teacher.writing",
    "distillation.losses",
}
WITHOUT_TORCH = {"__init__", "errors", "files", "records", "recipe", "console", "cli", "corpus.sources"}


def module(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


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


def folder(name: str) -> str:
    return name.partition(".")[0]


def without(name: str, names: set[str]) -> bool:
    """Whether a module, or the folder that it is in, is among the names."""
    return name in names or folder(name) in names


@pytest.mark.parametrize("path", FILES, ids=module)
def test_dependencies_point_down(path: Path) -> None:
    name, names = module(path), imported(path)
    if name in {"__init__", "__main__"}:
        return
    own = [other.removeprefix("sparsekd.") for other in names if other.startswith("sparsekd.")]
    for other in {folder(other) for other in own} - {folder(name)}:
        assert ORDER.index(other) < ORDER.index(folder(name)), f"{name} imports {other}, which stands above it"


@pytest.mark.parametrize("path", FILES, ids=module)
def test_light_modules_stay_light(path: Path) -> None:
    name = module(path)
    if without(name, WITHOUT_TRANSFORMERS):
        assert not any(folder(other) == "transformers" for other in imported(path))
    if without(name, WITHOUT_TORCH):
        assert not any(folder(other) == "torch" for other in imported(path, top_level_only=True))


@pytest.mark.parametrize("path", FILES, ids=module)
def test_a_folder_is_used_through_what_it_exports(path: Path) -> None:
    """`from sparsekd.models import load`, never `from sparsekd.models.loading import load`, outside of its folder."""
    for node in ast.walk(ast.parse(path.read_text())):
        parts = (getattr(node, "module", None) or "").split(".") if isinstance(node, ast.ImportFrom) else []
        if parts[:1] == ["sparsekd"] and len(parts) > 2 and parts[1] != folder(module(path)):
            assert PACKAGE.joinpath(*parts[1:]).is_dir(), f"import it from sparsekd.{parts[1]}"


@pytest.mark.parametrize("path", FILES, ids=module)
def test_files_stay_small_and_ascii(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    assert text.isascii()
    assert ast.get_docstring(ast.parse(text)), "every module says what it is"


def test_most_files_are_read_on_a_few_screens() -> None:
    assert statistics.median(path.read_text(encoding="utf-8").count("\n") for path in FILES) <= 150


def test_each_folder_says_what_comes_in_and_what_goes_out() -> None:
    for path in sorted(PACKAGE.glob("*/__init__.py")):
        said = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert "In:" in said and "out:" in said, path


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
