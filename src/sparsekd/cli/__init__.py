"""The command line. In: a verb with its options; out: results on stdout, as text or with `--json` as one object.

Each verb is a file here with its `command`, found by its name: it parses, calls one function of another folder and
prints. What several verbs share is in `options.py` and `printing.py`. Progress and messages go to stderr. To be quick
to start, no file here imports torch or transformers when it is imported; a `command` imports what it needs.
Exit codes: 0 ok, 1 our bug, 2 usage, 3 data, 4 resource, 5 the result is worse than before, 130/143 stopped by signal.
"""

from __future__ import annotations

import gc
import importlib
import os
import pkgutil
import sys
from collections.abc import Callable
from typing import Annotated

import typer

import sparsekd
from sparsekd.errors import SparseKDError

# In `--help`, in this order; a verb that is not named here comes after them.
_ORDER = [
    *["run", "corpus", "cache", "compress", "distill", "reproduce"],
    *["eval", "bench", "profile", "frontier", "export", "spectrum", "report", "inspect", "doctor"],
]

app = typer.Typer(
    help="Make a trained language model smaller and faster, taught by nothing but itself.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(is_wanted: bool) -> bool:
    if is_wanted:
        print(f"sparsekd {sparsekd.__version__}")
        raise typer.Exit
    return False


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _verbs() -> dict[str, Callable[..., None]]:
    """The `command` of each file of this folder that has one, by the file's name."""
    names = [file.name for file in pkgutil.iter_modules(__path__)]
    files = {name: importlib.import_module(f"{__name__}.{name}") for name in names}
    return {name: file.command for name, file in files.items() if hasattr(file, "command")}


def _place(verb: str) -> int:
    return _ORDER.index(verb) if verb in _ORDER else len(_ORDER)


for _verb, _command in sorted(_verbs().items(), key=lambda item: _place(item[0])):
    app.command(_verb)(_command)


def main() -> None:
    """The `sparsekd` command: an error for the user is one line, and its class decides the exit code."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # before transformers is imported: unpacking GGUF has a bar of its own
    gc.set_threshold(100_000, 50, 100)  # usually 700, 10, 10: looking for cycles took half the time of opening a GGUF
    try:
        app()
    except SparseKDError as error:
        _say(error)
        sys.exit(error.exit_code)
    except OSError as error:
        _say_why(f"{error.strerror or error}: {error.filename or ''}")
        sys.exit(4)
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit:  # typer has answered
        raise
    except BaseException as error:
        if type(error).__name__ == "PanicException":  # of a library written in Rust; it is no Exception
            _say_why(f"a library gave up: {error}")
            sys.exit(3)
        from sparsekd.device import lost_process, out_of_memory

        if out_of_memory(error):
            _say_why("out of memory: smaller batches, a shorter context or another dtype need less")
        elif lost_process(error):
            _say_why(
                "another process of this run has ended or hangs: run the same command again to go on from what is saved"
            )
        else:
            raise
        sys.exit(4)


def _say_why(message: str) -> None:
    """As an error of ours says it: on one line of bounded length."""
    _say(SparseKDError(message))


def _say(error: SparseKDError) -> None:
    """Unless another process of this run has said why it failed: the others fail like it, or because of it."""
    if "torch" in sys.modules:
        from sparsekd.device import is_first_to_fail

        if not is_first_to_fail():
            return
    print(f"sparsekd: {error}", file=sys.stderr)
