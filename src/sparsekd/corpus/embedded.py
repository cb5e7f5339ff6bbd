"""Text that installed packages carry: articles of Wikipedia in gensim, functions of Python's standard library."""

from __future__ import annotations

import ast
import importlib.util
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

from sparsekd.errors import ResourceError

_WIKIPEDIA = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"


def wikipedia() -> Iterator[tuple[str, str]]:
    """About a hundred articles of the Wikipedia dump that gensim ships for its tests, markup removed."""
    spec = importlib.util.find_spec("gensim")
    if spec is None or spec.origin is None:
        raise ResourceError('the embedded Wikipedia articles come with gensim: pip install "sparsekd[demo]"')
    path = Path(spec.origin).parent / _WIKIPEDIA
    if not path.exists():
        raise ResourceError(f"{path} is missing: pip install gensim==4.4.0, whose wheel carries it")
    import bz2

    from gensim.corpora.wikicorpus import extract_pages, filter_wiki

    with bz2.open(path, "rb") as dump:
        for title, text, page in extract_pages(dump, filter_namespaces=("0",)):  # pyright: ignore[reportArgumentType]
            article = _plain(filter_wiki(text))
            if len(article) > 500:  # shorter ones are redirects
                yield f"wikipedia:{page}:{title}", f"{title}\n\n{article}"


def _plain(article: str) -> str:
    """The prose of an article: of what `filter_wiki` leaves, the lines that are neither lists, tables nor captions."""
    lines = (line.strip() for line in article.splitlines())
    prose = (line for line in lines if len(line) >= 60 and not line.startswith(("*", "|", "!", ":", ";", "#", "{")))
    return "\n\n".join(prose).replace("'''", "").replace("''", "")


def python_functions() -> Iterator[tuple[str, str]]:
    """Functions of the running Python's standard library of 10 to 80 lines, in the order of their files."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.glob("*.py")) + sorted(library.glob("[a-z]*/*.py")):
        if path.parent.name in {"test", "idlelib", "site-packages", "lib2to3"}:
            continue
        try:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
            lines = text.splitlines()
        except (UnicodeDecodeError, SyntaxError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and 10 <= (node.end_lineno or 0) - node.lineno <= 80:
                function = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
                yield f"python:{path.relative_to(library)}:{node.name}", function
