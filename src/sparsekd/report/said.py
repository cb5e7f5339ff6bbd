"""What the models say after each prompt, side by side."""

from __future__ import annotations

from sparsekd.records import Record
from sparsekd.report.tables import model_title


def side_by_side(said: dict[str, list[Record]]) -> list[Record]:
    """For each prompt the models, each with the beginning of its text that is the first one's too, the rest, and a
    note; the first one's own text is all rest."""
    first = next(iter(said), None)
    return [
        {
            "prompt": records[0]["prompt"],
            "models": [_side(name, one, name == first) for name, one in zip(said, records, strict=True)],
        }
        for records in zip(*said.values(), strict=True)
    ]


def _side(name: str, one: Record, is_first: bool) -> Record:
    text, at = one["text"], 0 if is_first else one["parts_at"]
    end = len(text) if at is None else one["ends"][at - 1] if at else 0
    facts = [_counted(len(one["tokens"])), f"repetition {one['repetition']:.2f}"]
    if one["has_ended"]:
        facts.append("ended by itself")
    if not is_first:
        facts.append("the same to the end" if at is None else f"parts after {_counted(at)}")
    return {
        "model": model_title(name),
        "same": text[:end],
        "parts": one["parts_at"] is not None,
        "rest": text[end:],
        "note": ", ".join(facts),
    }


def _counted(num_tokens: int) -> str:
    return f"{num_tokens} token" if num_tokens == 1 else f"{num_tokens} tokens"
