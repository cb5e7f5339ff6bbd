"""The tokenizer of a model in the keys of GGUF, from a transformers tokenizer or as another GGUF file has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from sparsekd import corpus
from sparsekd.errors import UsageError
from sparsekd.models import gguf_reader

if TYPE_CHECKING:
    from gguf import GGUFWriter

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's types of tokens
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
_REST = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
_SPLITS = {  # how text is split before merges, as tokenizer.json says it, and llama.cpp's name of it
    "ByteLevel": "gpt-2",
    "Digits ByteLevel": "smollm",
    f"{_CONTRACTIONS}\\p{{N}}{_REST}": "qwen2",
    f"{_CONTRACTIONS}\\p{{N}}{{1,3}}{_REST}": "llama-bpe",
}
_WITH_ALL_MERGES = "dbrx"  # as llama-bpe, which takes a word that is a token as it is, without merging
_SPACE = "\u2581"  # of tokenizers of characters
_GENERAL = ("general.name", "general.license", "general.languages", "general.tags")  # beginnings of what still holds


def copy_metadata(writer: GGUFWriter, base: Path) -> None:
    """The tokenizer of another file, and what it says of itself that holds for a model made from it."""
    for key, field in gguf_reader(base).fields.items():
        if key.startswith(("tokenizer.", *_GENERAL)):
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=inner)


def describe(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Writes a tokenizer for a model that has embeddings for so many tokens. Raises `UsageError` for one that llama.cpp
    has no name for."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unknown("has no tokenizer.json")
    described = json.loads(backend.to_str())
    if described["model"]["type"] != "BPE":
        raise _unknown(f"is of kind {described['model']['type']}")
    is_bytes = not described["model"].get("byte_fallback")  # else characters, and bytes for what is not in the list
    tokens, types = _tokens(tokenizer, described, rows)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in described["model"]["merges"]]
    if is_bytes:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split(described))
        writer.add_token_merges(merges)
    else:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokens, merges))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_add_space_prefix(not is_bytes and _first_token(tokenizer, "a").startswith(_SPACE))
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(corpus.beginning(tokenizer) == [tokenizer.bos_token_id])
    writer.add_add_eos_token(False)
    template: Any = tokenizer.chat_template
    if template:
        named = isinstance(template, dict)
        several: Any = [{"name": name, "template": one} for name, one in template.items()] if named else template
        writer.add_chat_template(several)


def _unknown(why: str) -> UsageError:
    known = ", ".join(_SPLITS.values())
    return UsageError(
        f"the tokenizer {why}: format gguf takes byte-level BPE such as {known}, and BPE with byte fallback"
    )


def _split(described: Any) -> str:
    """llama.cpp's name for how a byte-level tokenizer splits text."""
    found: Any = described["pre_tokenizer"] or {"type": "nothing"}
    steps = found["pretokenizers"] if found["type"] == "Sequence" else [found]
    if steps[0]["type"] == "Split":
        name = steps[0]["pattern"].get("Regex", "")
    else:
        name = " ".join(step["type"] for step in steps)
    added = any(step.get("add_prefix_space") for step in steps)
    if name not in _SPLITS or added:
        raise _unknown("splits text in a way of its own" if not added else "puts a space before every text")
    is_llama = _SPLITS[name] == "llama-bpe"
    return _WITH_ALL_MERGES if is_llama and not described["model"].get("ignore_merges") else _SPLITS[name]


def _first_token(tokenizer: Any, text: str) -> str:
    return tokenizer.convert_ids_to_tokens(corpus.encode(tokenizer, text)[0])


def _tokens(tokenizer: PreTrainedTokenizerBase, described: Any, rows: int) -> tuple[list[str], list[int]]:
    """The tokens and their types in the order of their numbers; embeddings that belong to none are named too."""
    added = {token["id"]: token for token in described["added_tokens"]}
    spelled = {number: token for token, number in tokenizer.get_vocab().items()}
    tokens, types = [], []
    for number in range(rows):
        token = spelled.get(number)
        if token is None:
            kind = _UNUSED
        elif number == tokenizer.unk_token_id and described["model"].get("byte_fallback"):
            kind = _UNKNOWN
        elif number in added:
            kind = _CONTROL if added[number]["special"] else _USER_DEFINED
        elif described["model"].get("byte_fallback") and len(token) == 6 and token.startswith("<0x"):
            kind = _BYTE
        else:
            kind = _NORMAL
        tokens.append(token if token is not None else f"[PAD{number}]")
        types.append(kind)
    return tokens, types


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """What llama.cpp merges by where a list of merges would: the earlier a token is made, the higher."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]
