"""Format `openvino`: the graph and its example say what PyTorch says; what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from architectures import made
from serving import MODELS, continued, example_says, model_named
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from sparsekd.errors import ResourceError, UsageError
from sparsekd.export import Source, compare, export, format_named, sample
from sparsekd.export import openvino as format_

pytest.importorskip("openvino", reason='needs pip install "sparsekd[openvino]"')
import openvino


@pytest.fixture(scope="module")
def exported(
    make_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[PreTrainedModel, Path, Any]]:
    """A model, its exported folder, and the record of it; each is made once."""
    made: dict[str, tuple[PreTrainedModel, Path, Any]] = {}

    def get(name: str) -> tuple[PreTrainedModel, Path, Any]:
        if name not in made:
            model, folder = model_named(name, make_model), tmp_path_factory.mktemp("openvino") / "out"
            made[name] = model, folder, export(model, tokenizer, "openvino", folder, Source("tiny"), weights="float32")
        return made[name]

    return get


@pytest.mark.parametrize("name", MODELS)
def test_it_says_what_pytorch_says(name: str, exported: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    model, folder, record = exported(name)
    assert record["comparison"]["largest_logit_difference"] < 1e-4
    assert record["comparison"]["agreement"] == 1
    assert example_says(folder) == continued(model, tokenizer)
    assert set(record["versions"]) >= {"torch", "transformers", *format_.PACKAGES}


@pytest.mark.parametrize(("weights", "size"), [("int8", 0.3), ("int4", 0.3)])
def test_smaller_numbers(
    weights: str, size: float, exported: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Of the graph that is there: an export is slow."""
    model, folder, _ = exported(MODELS[0])
    graph = format_._compressed(openvino.Core().read_model(folder / format_.FILE), weights)
    openvino.save_model(graph, tmp_path / format_.FILE, compress_to_fp16=False)
    found = compare(model, format_.open(tmp_path), sample(model, tokenizer, None))
    assert abs(found.perplexity / found.reference_perplexity - 1) < {"int8": 0.05, "int4": 0.5}[weights]
    assert found.largest_logit_difference > 0
    before, after = (path.joinpath("openvino_model.bin").stat().st_size for path in (folder, tmp_path))
    assert after < size * before


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="keys and values of earlier tokens and nothing else, which qwen3_next"):
        format_.require(made("qwen3_next"))
    monkeypatch.setattr(format_, "PACKAGES", (*format_.PACKAGES, "not_there"))
    with pytest.raises(ResourceError, match=r'format openvino needs not_there: pip install "sparsekd\[openvino\]"'):
        format_named("openvino")
