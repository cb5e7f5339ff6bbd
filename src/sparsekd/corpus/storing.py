"""A corpus on disk.

Blocks are stored once, in `blocks.parquet`, with the ids of the documents they come from; `manifest.json` is written
last and holds their fingerprint.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sparsekd import files, records
from sparsekd.corpus.blocks import Block, Corpus, SourceReport, fingerprint_of
from sparsekd.errors import DataError
from sparsekd.recipe import check_text_name


def save(corpus: Corpus, folder: Path) -> None:
    """Writes the corpus; the manifest, last, makes it whole."""
    table = pa.table(
        {
            "block_id": pa.array(range(len(corpus.blocks)), pa.int64()),
            "source": pa.array([block.source for block in corpus.blocks]),
            "documents": pa.array([block.documents for block in corpus.blocks], pa.list_(pa.string())),
            "tokens": pa.array([block.tokens for block in corpus.blocks], pa.list_(pa.int32())),
        }
    )
    with files.atomic_path(folder / "blocks.parquet") as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)
    save_texts(corpus, folder)


def save_texts(corpus: Corpus, folder: Path) -> None:
    """Writes the evaluation texts, and then the manifest that lists them."""
    for name, text in corpus.texts.items():
        files.write_text(text_path(folder, name), text)
    manifest = {
        "fingerprint": corpus.fingerprint,
        "train_ids": corpus.train_ids.tolist(),
        "validation_ids": corpus.validation_ids.tolist(),
        "texts": {name: files.sha256(text) for name, text in sorted(corpus.texts.items())},
        "separator": corpus.separator,
        "sources": {name: vars(report) for name, report in corpus.reports.items()},
    }
    records.write(folder / "manifest.json", manifest)


def text_path(folder: Path, name: str) -> Path:
    """Where an evaluation text lies; raises `UsageError` for a name that is not a plain file name."""
    check_text_name(name)
    return folder / f"text-{name}.txt"


def load(folder: Path) -> Corpus:
    """Reads a saved corpus; raises `DataError` when a file is missing or its content is not what was written."""
    manifest = records.read(folder / "manifest.json", way_out=f"remove {folder} to make the corpus again")
    try:
        table = pq.read_table(folder / "blocks.parquet", page_checksum_verification=True)
        rows = zip(*(table[name].to_pylist() for name in ("tokens", "source", "documents")), strict=True)
        blocks = [Block(np.array(tokens, np.int32), source, documents) for tokens, source, documents in rows]
        texts = {name: text_path(folder, name).read_bytes().decode("utf-8") for name in manifest["texts"]}
        reports = {name: SourceReport(**values) for name, values in manifest["sources"].items()}
        train, validation = np.array(manifest["train_ids"]), np.array(manifest["validation_ids"])
        corpus = Corpus(blocks, train, validation, texts, manifest["fingerprint"], reports, manifest["separator"])
        found = fingerprint_of(corpus)
        changed = [name for name, text in texts.items() if files.sha256(text) != manifest["texts"][name]]
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"corpus {folder} is damaged: {reason}; make it again with --fresh") from error
    if found != corpus.fingerprint:
        raise DataError(f"corpus {folder} is damaged: its content does not match its fingerprint; use --fresh")
    if changed:
        raise DataError(f"{text_path(folder, changed[0])} is damaged: its content is not what was written; use --fresh")
    return corpus
