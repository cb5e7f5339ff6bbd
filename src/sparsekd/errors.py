"""Everything that can go wrong for a user, as one small tree; the class decides the exit code of the command line.

Messages are one line: what is wrong, where, what was expected, how to fix it.
"""

_LONGEST = 1000  # characters of a line: names and values in it may be of any length


class SparseKDError(Exception):
    """Base of all errors meant for the user; `exit_code` is what the command returns. What is not printable in
    the message, and in the lines of detail below it, is escaped, and the middle of what is long left out."""

    exit_code = 1

    def __init__(self, message: str, *details: str):
        super().__init__("\n  ".join(map(_line, (message, *details))))


def _line(text: str) -> str:
    if len(text) > _LONGEST:
        half = _LONGEST // 2
        text = f"{text[:half]} ... {text[-half:]}"
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


class UsageError(SparseKDError):
    """A recipe, option or model name that cannot be used as given."""

    exit_code = 2


class DataError(SparseKDError):
    """A corpus, cache, checkpoint or model whose content is missing, damaged or does not fit."""

    exit_code = 3


class Diverged(DataError):
    """A training whose loss or gradient is no longer finite; the weights are those before the step."""


class MismatchError(DataError):
    """Something on disk was made from other inputs than the ones now asked for."""


class ResourceError(SparseKDError):
    """Not enough disk, memory or a missing optional package."""

    exit_code = 4


class Stopped(SparseKDError):
    """A signal asked the run to stop; what was done so far is saved."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


class QualityError(SparseKDError):
    """The run is complete, but its result is worse than what it started from."""

    exit_code = 5
