"""The process that `subject.Remote` starts: answers on what was stdout; what libraries print goes to stderr."""

from __future__ import annotations

import json
import os
import sys

from sparsekd.bench.subject import serve


def main() -> None:
    """Serves until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(found: dict[str, object]) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    serve(sys.stdin, answer)


if __name__ == "__main__":
    main()
