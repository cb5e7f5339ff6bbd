"""Every message that a user can meet has a line in docs/troubleshooting.md, and every line there is of a message.

Messages are read from the code, not run: the first argument of every error of ours wherever one is made, of a
`ValueError`, which another message quotes, and of warnings. What is put into a message becomes `...`, unless it is text
as well: a constant, a variable of the function, an argument of its callers, what a function of the module returns.
A line of the page quotes a message in its first cell, in code, with `...` for values and for what it leaves out.
"""

import ast
import inspect
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import sparsekd
from sparsekd import errors

PACKAGE = Path(sparsekd.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "troubleshooting.md"
ERRORS = {name for name, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.SparseKDError)}
WARNINGS = {"warn", "_say_why"}
NOTES = {"say", "_say"}  # which say much that needs no explanation; but for this:
NOTED = re.compile(r"(warning|out of memory|leak guard|skipped):|repeat to fill")
QUOTED = {"ValueError"}
GAP = "..."
MOST = 60  # readings of one text, where several things may stand in its places
ENOUGH = 15  # letters that tell a message from others; of a shorter one, all


class Module:
    """One file of the package: its calls, each with the function that it stands in, its functions and constants."""

    def __init__(self, path: Path, text: str):
        tree = ast.parse(text)
        self.path, self.name = path, path.parent.name if path.stem == "__init__" else path.stem
        self.calls = list(_calls(tree))
        self.functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        self.constants = dict(_assigned(tree.body))


class Reader:
    """The messages in a package, given as the text of its files."""

    def __init__(self, texts: dict[Path, str]):
        self.modules = [Module(path, text) for path, text in texts.items()]
        self.calls: dict[str, list[tuple[Module, ast.FunctionDef | None, ast.Call]]] = {}
        for module in self.modules:
            for function, call in module.calls:
                self.calls.setdefault(ast.unparse(call.func), []).append((module, function, call))

    def readings(self) -> Iterator[tuple[str, set[str]]]:
        """Each place where a message is made, with all that it may say as far as the code tells."""
        for module in self.modules:
            for function, call in module.calls:
                said = set(map(_plain, self._said(module, function, call)))
                if any(_letters(text.removeprefix("warning: ")) for text in said):  # else it is all values
                    yield f"{module.path}:{call.lineno}", said

    def messages(self) -> dict[str, str]:
        """The place of each message by its text; of what stands there, not what another text there includes."""
        found: dict[str, str] = {}
        for place, said in self.readings():
            for text in sorted(said):
                is_included = any(_pattern(other).fullmatch(text) for other in said if other != text)
                if len(_letters(text)) > 2 and not is_included:
                    found.setdefault(text, place)
        return found

    def unread(self) -> list[str]:
        """Where an error of ours is made of which no text is found."""
        return [
            f"{module.path}:{call.lineno}"
            for module in self.modules
            for function, call in module.calls
            if _name(call.func) in ERRORS and not any(map(_letters, self._said(module, function, call)))
        ]

    def _said(self, module: Module, function: ast.FunctionDef | None, call: ast.Call) -> list[str]:
        name = _name(call.func)
        if not call.args or name not in ERRORS | WARNINGS | NOTES | QUOTED:
            return []
        texts = self._texts(call.args[0], module, function, 0)
        if name in NOTES:
            texts = [text for text in texts if NOTED.search(text)]
        if name in QUOTED:
            return [f"{GAP} {text} {GAP}" for text in texts]
        prefix = "warning: " if name == "warn" and ast.unparse(call.func) != "warnings.warn" else ""
        return [prefix + text for text in texts]

    def _texts(self, node: ast.expr, module: Module, function: ast.FunctionDef | None, depth: int) -> list[str]:
        """What an expression may say, as far as the code tells."""

        def inner(part: ast.expr) -> list[str]:
            return self._texts(part, module, function, depth)

        found: Iterable[str] = [GAP]
        match node:
            case _ if depth > 4:
                pass
            case ast.Constant(value=None):
                found = []
            case ast.Constant(value=str(value)):
                found = [value]
            case ast.JoinedStr(values=values):
                found = map("".join, itertools.islice(itertools.product(*map(inner, values)), MOST))
            case ast.FormattedValue(value=value) | ast.Starred(value=value) | ast.Subscript(value=value):
                found = inner(value)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                found = map("".join, itertools.product(inner(left), inner(right)))
            case ast.IfExp(body=body, orelse=orelse):
                found = inner(body) + inner(orelse)
            case ast.BoolOp(op=ast.Or(), values=values):
                found = itertools.chain(*map(inner, values))
            case ast.List(elts=[first, *_]) | ast.Tuple(elts=[first, *_]):
                found = inner(first)
            case ast.Name(id=name):
                found = self._named(name, module, function, depth + 1)
            case ast.Call(func=ast.Name(id=name)) if name in module.functions:
                found = self._returned(node, module, function, depth + 1)
        return list(dict.fromkeys(found))[:MOST] or [GAP]

    def _returned(self, call: ast.Call, module: Module, function: ast.FunctionDef | None, depth: int) -> list[str]:
        """What a function of the module gives; and what it is given, if it makes a text of that in a way of its own."""
        called = module.functions[_name(call.func)]
        returns = [node.value for node in ast.walk(called) if isinstance(node, ast.Return) and node.value]
        texts = [text for value in returns for text in self._texts(value, module, called, depth)]
        given = [text for part in call.args for text in self._texts(part, module, function, depth) if " " in text]
        lost = [text for text in given if not any(text in whole for whole in texts)]
        return texts + [f"{GAP} {text} {GAP}" for text in lost]

    def _named(self, name: str, module: Module, function: ast.FunctionDef | None, depth: int) -> list[str]:
        """What a name stands for: in its function, in the callers of that, in its module or another one."""
        if function is not None:
            local = [value for target, value in _assigned(ast.walk(function)) if target == name]
            texts = [text for value in local for text in self._texts(value, module, function, depth)]
            parameters = [parameter.arg for parameter in function.args.args]
            if name in parameters:
                texts += self._given(name, parameters.index(name), module, function, depth)
            if texts:
                return texts
        owners = [one for one in (module, *self.modules) if name in one.constants] if name.isupper() else []
        return self._texts(owners[0].constants[name], owners[0], None, depth) if owners else [GAP]

    def _given(self, name: str, place: int, module: Module, function: ast.FunctionDef, depth: int) -> list[str]:
        """What the callers give for a parameter, in the function's module or through the module's name."""
        own = [(caller, *call) for caller, *call in self.calls.get(function.name, []) if caller is module]
        defaults = function.args.defaults
        start = place - len(function.args.args) + len(defaults)
        texts = [] if start < 0 else [""] if ast.unparse(defaults[start]) == "''" else [GAP]
        for caller, within, call in own + self.calls.get(f"{module.name}.{function.name}", []):
            values = [word.value for word in call.keywords if word.arg == name] or call.args[place : place + 1]
            texts += [text or GAP for value in values for text in self._texts(value, caller, within, depth)]
        return texts or [GAP]


def _calls(tree: ast.AST, function: ast.FunctionDef | None = None) -> Iterator[tuple[ast.FunctionDef | None, ast.Call]]:
    """Every call, with the function that it stands in."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Call):
            yield function, node
        yield from _calls(node, node if isinstance(node, ast.FunctionDef) else function)


def _assigned(nodes: Iterable[ast.AST]) -> Iterator[tuple[str, ast.expr]]:
    """Names and the values that they are given."""
    for node in nodes:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    yield target.id, node.value


def _name(called: ast.expr) -> str:
    return ast.unparse(called).rpartition(".")[2]


def _plain(text: str) -> str:
    return re.sub(r"\.{4,}", GAP, " ".join(text.split()))


def _letters(text: str) -> str:
    return re.sub(r"[\W_]", "", text)


def uncovered(messages: Iterable[str], quotes: Iterable[str]) -> list[str]:
    """The messages that none of the quotes is of."""
    patterns = [(_pattern(quote), len(_letters(quote))) for quote in quotes]
    return [
        message
        for message in messages
        if not any(said >= min(ENOUGH, len(_letters(message))) and of.fullmatch(message) for of, said in patterns)
    ]


def _pattern(quote: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, _plain(quote).split(GAP))))


def quoted(page: str) -> list[str]:
    """What the tables of the page quote: the code in the first cell of each row."""
    first_cells = re.findall(r"(?m)^\| (.+?) \| ", page)
    return [code[1].strip() for cell in first_cells for code in re.findall(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", cell)]


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader(
        {path.relative_to(PACKAGE): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
    )


@pytest.fixture(scope="module")
def quotes() -> list[str]:
    return quoted(PAGE.read_text(encoding="utf-8"))


def test_every_message_has_a_line(reader: Reader, quotes: list[str]) -> None:
    messages = reader.messages()
    missing = [f"{messages[text]}: {text}" for text in uncovered(messages, quotes)]
    assert not missing, (
        "docs/troubleshooting.md has no line for a message. Add a row to the table of its stage: the message in code, "
        "`...` for its values, then its cause or what to do:\n" + "\n".join(missing)
    )


def test_every_line_is_of_a_message(reader: Reader, quotes: list[str]) -> None:
    readings = {text for _, said in reader.readings() for text in said}
    stale = [quote for quote in quotes if len(uncovered(readings, [quote])) == len(readings)]
    assert not stale, (
        "docs/troubleshooting.md quotes what no message says (any more), or too little of one. Change or remove the "
        "row:\n" + "\n".join(stale)
    )


def test_no_error_goes_unread(reader: Reader) -> None:
    """A message that is made in a way of its own would be missed, and so would its line."""
    assert len(reader.messages()) > 230
    assert len(set(reader.messages().values())) > 200
    assert not reader.unread()


def test_a_new_message_is_missed(quotes: list[str]) -> None:
    made_up = Reader(
        {
            Path("new.py"): """
WAY_OUT = "look into the cupboard"

def find(path, colour, is_old):
    what = f"{colour} socks"
    if is_old:
        raise DataError(f"{path}: no {what} in the drawer; {WAY_OUT}")
    raise missing("the left shoe")

def missing(what):
    return UsageError(f"{what} is {lost(what)} since {1 + 1} days" if what else "nothing is lost")

def lost(what):
    return "not where it was"
"""
        }
    ).messages()
    expected = [
        "...: no ... socks in the drawer; look into the cupboard",
        "the left shoe is not where it was since ... days",
        "nothing is lost",
    ]
    assert set(expected) <= made_up.keys()
    assert set(expected) <= set(uncovered(made_up, quotes))
    assert not uncovered(expected[:1], ["...: no ... in the drawer; look ..."])
    assert uncovered(expected[:1], ["...: no ...", "... in the drawer; look into the cupboard twice"])
