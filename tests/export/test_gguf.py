"""Format gguf: what the file holds, what transformers reads from it, and what llama.cpp says where it is installed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from narrowing import chosen, narrow
from serving import serves_as_pytorch_does
from tiny import paragraphs, sharpened
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as kinds
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import sparsekd
from sparsekd import export
from sparsekd.errors import QualityError, ResourceError, UsageError
from sparsekd.export import Source, llama_cpp

Make = Callable[..., PreTrainedModel]
Write = Callable[..., Any]
TEXT = "\n\n".join(paragraphs(12, seed=3))
WINDOW = torch.zeros(1, 40, dtype=torch.long)
LLAMA_CPP = pytest.mark.skipif(llama_cpp.missing() is not None, reason=str(llama_cpp.missing()))


@pytest.fixture
def without_llama_cpp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Most of these tests are of the file, and each question to llama.cpp takes two seconds."""
    monkeypatch.setenv(llama_cpp.FOLDER, str(tmp_path / "nothing"))


@pytest.fixture
def write(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Write:
    """Exports a model to `tmp_path / "out"` and returns the record."""

    def written(model: PreTrainedModel, weights: str = "f32", name: str = "tiny/model", **changes: Any) -> Any:
        arguments: Any = {"tokenizer": tokenizer, "out": tmp_path / "out"} | changes
        return export.export(model, format_name="gguf", source=Source(name), weights=weights, text=TEXT, **arguments)

    return written


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata, and tensors by name."""
    reader = gguf.GGUFReader(folder / "model.gguf")
    return {key: field.contents() for key, field in reader.fields.items()}, {one.name: one for one in reader.tensors}


def biased(model: PreTrainedModel) -> PreTrainedModel:
    """With vectors that are not all ones or zeros, so that none can be left out unseen."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    return model


@pytest.mark.usefixtures("without_llama_cpp")
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3"])
def test_transformers_reads_the_same_model(architecture: str, make_model: Make, write: Write, tmp_path: Path) -> None:
    model = biased(make_model(architecture))
    record = write(model)
    assert record["comparison"]["largest_logit_difference"] < 1e-5
    assert record["comparison"]["agreement"] == 1
    assert "npm install" in record["notes"][-1]
    metadata, tensors = read(tmp_path / "out")
    assert metadata["general.architecture"] == architecture
    assert metadata[f"{architecture}.feed_forward_length"] == 64
    assert "output.weight" in tensors
    assert sum(one.n_elements for one in tensors.values()) == sum(one.numel() for one in model.parameters())
    if architecture != "qwen3":  # whose heads transformers takes to be of 128 numbers, whatever the file says
        opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
        ids = torch.arange(40).view(2, 20)
        torch.testing.assert_close(opened(ids).logits, model(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("without_llama_cpp")
def test_tied_embeddings_are_stored_once(make_model: Make, write: Write, tmp_path: Path) -> None:
    record = write(make_model("llama", tie_word_embeddings=True, attention_bias=False))
    assert record["comparison"]["largest_logit_difference"] < 1e-5
    assert "output.weight" not in read(tmp_path / "out")[1]


@pytest.mark.usefixtures("without_llama_cpp")
@pytest.mark.parametrize(("architecture", "written"), [("llama", [40, 24]), ("qwen3", 40), ("phi3", 40)])
def test_a_width_for_each_layer(
    architecture: str, written: Any, make_model: Make, write: Write, tmp_path: Path
) -> None:
    model = make_model(architecture)
    narrow(model, chosen(model, 40, 24))
    record = write(model)
    assert record["comparison"]["largest_logit_difference"] < 1e-5
    metadata, tensors = read(tmp_path / "out")
    name = {"llama": "deci"}.get(architecture, architecture)
    assert metadata["general.architecture"] == name
    assert metadata[f"{name}.feed_forward_length"] == written
    padded = [note for note in record["notes"] if "filled up with zeros to 40" in note]
    assert len(padded) == (architecture != "llama")
    assert tensors["blk.1.ffn_down.weight"].shape[0] == (24 if architecture == "llama" else 40)


@pytest.mark.usefixtures("without_llama_cpp")
def test_one_width_is_that_of_the_base(make_model: Make, write: Write, tmp_path: Path) -> None:
    model = make_model("llama")
    narrow(model, chosen(model, 32))
    assert write(model)["comparison"]["largest_logit_difference"] < 1e-5
    assert read(tmp_path / "out")[0]["llama.feed_forward_length"] == 32


@pytest.mark.usefixtures("without_llama_cpp")
def test_fewer_layers_are_a_smaller_file(make_model: Make, write: Write, tmp_path: Path) -> None:
    for architecture in ("llama", "qwen3"):
        model = make_model(architecture, num_hidden_layers=4)
        sparsekd.compress(model, torch.arange(64).view(2, 32), reduction=0.5, method="shortgpt")
        record = write(model, out=tmp_path / architecture)
        assert record["comparison"]["largest_logit_difference"] < 1e-5
        assert not any("smaller" in note for note in record["notes"])
        assert read(tmp_path / architecture)[0][f"{architecture}.block_count"] == 2


@pytest.mark.usefixtures("without_llama_cpp")
@pytest.mark.parametrize("architecture", ["llama", "phi3"])
@pytest.mark.parametrize("method", ["svd", "magnitude"])
def test_other_forms_become_dense(method: str, architecture: str, make_model: Make, write: Write) -> None:
    model = sparsekd.compress(make_model(architecture), reduction=0.5, method=method)
    record = write(model)
    assert record["comparison"]["largest_logit_difference"] < 1e-5
    assert any("neither smaller nor faster" in note for note in record["notes"])


@pytest.mark.usefixtures("without_llama_cpp")
@pytest.mark.parametrize(
    ("first", "last", "said"),
    [
        ({"method": "shortgpt", "reduction": 0.5}, {"method": "activation"}, None),
        ({"method": "shortgpt", "reduction": 0.5}, {"method": "svd"}, "more parameters than in the exported model"),
        ({"method": "neurons", "reduction": 0.25, "multiple": 2}, {"method": "magnitude"}, None),
    ],
)
def test_what_several_steps_left(
    first: dict[str, Any], last: dict[str, Any], said: str | None, make_model: Make, write: Write, tmp_path: Path
) -> None:
    model = make_model("llama", num_hidden_layers=4)
    tokens = torch.randint(0, 300, (40, 32), generator=torch.Generator().manual_seed(1))
    sparsekd.compress(model, tokens, first=[first], reduction=0.25, **last)
    record = write(model)
    assert record["comparison"]["largest_logit_difference"] < 1e-5
    notes = [note for note in record["notes"] if "parameters" in note or "dense" in note]
    assert len(notes) == (said is not None) and all(str(said) in note for note in notes)


@pytest.mark.usefixtures("without_llama_cpp")
def test_number_formats(make_model: Make, write: Write, tmp_path: Path) -> None:
    model, sizes = make_model("llama", hidden_size=64), {}
    narrow(model, chosen(model, 48))
    for weights, kind in [("f32", "F32"), ("f16", "F16"), ("bf16", "BF16"), ("q8_0", "Q8_0")]:
        record = write(model, weights, out=tmp_path / weights)
        tensors = read(tmp_path / weights)[1]
        assert {one.tensor_type.name for one in tensors.values() if "norm" in one.name} == {"F32"}
        assert tensors["blk.0.attn_q.weight"].tensor_type.name == kind
        sizes[weights] = record["bytes"]
        unfit = [note for note in record["notes"] if "no multiple of 32" in note]
        assert unfit == (["2 matrices are float16, for their rows are no multiple of 32"] if weights == "q8_0" else [])
    assert sizes["q8_0"] < sizes["f16"] == sizes["bf16"] < sizes["f32"]
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name == "F16"  # 48 to a row


@pytest.mark.skipif(shutil.which("llama-quantize") is None, reason="llama-quantize is not on PATH")
@pytest.mark.usefixtures("without_llama_cpp")
def test_formats_that_llama_quantize_makes(make_model: Make, write: Write, tmp_path: Path) -> None:
    model = make_model("llama", hidden_size=256, intermediate_size=256)
    sizes = [write(model, weights, out=tmp_path / weights)["bytes"] for weights in ("q4_k_m", "q6_k", "q8_0")]
    assert sizes == sorted(sizes)
    assert [file.name for file in (tmp_path / "q6_k").iterdir()] == ["export.json", "model.gguf"]


@pytest.mark.usefixtures("without_llama_cpp")
def test_a_base_that_is_gguf_lends_its_tokenizer(make_model: Make, write: Write, tmp_path: Path) -> None:
    model = make_model("llama")
    write(model, out=tmp_path / "base")
    with_licence = gguf.GGUFReader(tmp_path / "base" / "model.gguf")
    assert with_licence.fields["general.name"].contents() == "model"
    record = write(model, "f16", name=str(tmp_path / "base" / "model.gguf"))
    (base, _), (copied, _) = read(tmp_path / "base"), read(tmp_path / "out")
    kept = {key for key in base if key.startswith(("tokenizer.", "general.name"))}
    assert len(kept) > 8 and {key: copied[key] for key in kept} == {key: base[key] for key in kept}
    assert copied["general.file_type"] == 1
    assert record["source"].endswith("model.gguf")


def tokenizer_of(backend: Tokenizer, *, special: list[str], **names: str) -> PreTrainedTokenizerFast:
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*paragraphs(50, seed=0), "it's 1984, 12345 and 12 and 1984"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def byte_level(*steps: Any, ignore_merges: bool = False) -> PreTrainedTokenizerFast:
    backend = Tokenizer(kinds.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    backend.decoder = decoders.ByteLevel()
    return tokenizer_of(backend, special=["<|endoftext|>"], eos_token="<|endoftext|>")


def splitting(digits: str) -> list[Any]:
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]


def with_byte_fallback() -> PreTrainedTokenizerFast:
    """Such as Llama 2's and Phi-3's: characters, a space before the text, bytes for what is not in the vocabulary."""
    backend = Tokenizer(kinds.BPE(unk_token="<unk>"))
    space = "\u2581"
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    named = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<unk>", "<s>", "</s>", *named]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False, max_token_length=12)
    backend.train_from_iterator(paragraphs(50, seed=0), trainer)
    learned = json.loads(backend.to_str())["model"]
    whole = Tokenizer(
        kinds.BPE(
            learned["vocab"],
            [tuple(pair) for pair in learned["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    whole.normalizer = backend.normalizer
    whole.decoder = decoders.Sequence([decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()])
    whole.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=whole, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {
    "gpt-2": lambda: byte_level(pre_tokenizers.ByteLevel(False)),
    "smollm": lambda: byte_level(pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)),
    "qwen2": lambda: byte_level(*splitting(r"\p{N}")),
    "llama-bpe": lambda: byte_level(*splitting(r"\p{N}{1,3}"), ignore_merges=True),
    "dbrx": lambda: byte_level(*splitting(r"\p{N}{1,3}")),
    "default": with_byte_fallback,
}


@LLAMA_CPP
@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_splits_text_alike(name: str, make_model: Make, write: Write, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[name]()
    tokenizer.chat_template = "{{ messages }}"
    model = make_model("llama", vocab_size=len(tokenizer) + 3)
    record = write(model, tokenizer=tokenizer)
    assert record["llama.cpp"]["text_is_split_alike"]
    metadata, _ = read(tmp_path / "out")
    assert metadata["tokenizer.ggml.pre"] == name
    assert metadata["tokenizer.ggml.tokens"][-1] == f"[PAD{len(tokenizer) + 2}]"
    assert metadata["tokenizer.chat_template"] == "{{ messages }}"


STRETCHED = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@LLAMA_CPP
@pytest.mark.parametrize(
    ("architecture", "widths", "changes"),
    [("llama", (40, 24), {"rope_parameters": STRETCHED}), ("qwen3", (64,), {}), ("phi3", (40, 24), {})],
)
def test_llama_cpp_says_the_same(
    architecture: str, widths: Any, changes: Any, make_model: Make, write: Write, tmp_path: Path
) -> None:
    model = sharpened(biased(make_model(architecture, **changes)))
    narrow(model, chosen(model, *widths))
    record = write(model)
    found = record["llama.cpp"]
    assert record["comparison"]["largest_logit_difference"] < 1e-4
    assert found["largest_logit_difference"] < 0.02  # its cache of keys and values is float16
    assert found["greedy_tokens_alike"] == found["greedy_tokens"]
    serves_as_pytorch_does(model, tmp_path / "out", "llama.cpp")
    assert found["perplexity"] == pytest.approx(found["reference_perplexity"], rel=1e-3)


# ---- bad input


@pytest.mark.usefixtures("without_llama_cpp")
@pytest.mark.parametrize(
    ("architecture", "changes", "problem"),
    [
        ("gpt2", {}, "gpt2: it has llama, phi3, qwen2, qwen3"),
        ("qwen3", {"hidden_act": "gelu"}, "qwen3 model with gelu"),
        ("qwen3", {"rope_parameters": STRETCHED}, "rotary embedding is of type llama3"),
    ],
)
def test_a_model_that_llama_cpp_does_not_have(
    architecture: str, changes: Any, problem: str, make_model: Make, write: Write, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=problem):
        write(make_model(architecture, **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("without_llama_cpp")
def test_a_tokenizer_that_llama_cpp_does_not_have(make_model: Make, write: Write, tmp_path: Path) -> None:
    backend = Tokenizer(kinds.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    model = make_model("llama")
    with pytest.raises(UsageError, match="the tokenizer is of kind WordLevel"):
        write(model, tokenizer=PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))
    with pytest.raises(UsageError, match="splits text in a way of its own"):
        write(model, tokenizer=byte_level(pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(False)))
    with pytest.raises(UsageError, match="puts a space before every text"):
        write(model, tokenizer=byte_level(pre_tokenizers.ByteLevel(True)))
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("without_llama_cpp")
def test_formats_of_llama_quantize_need_it(
    make_model: Make, write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ResourceError, match=r"q4_k_m is made by llama\.cpp's llama-quantize, which is not on PATH"):
        write(make_model("llama"), "q4_k_m")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("without_llama_cpp")
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_a_file_that_is_not_the_model_is_not_kept(make_model: Make, write: Write, tmp_path: Path) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = 1e6  # too large for float16
    with pytest.raises(QualityError, match="does not say what the model does"):
        write(model, "f16")
    assert not list(tmp_path.iterdir())


@LLAMA_CPP
def test_what_llama_cpp_does_not_open_is_named(make_model: Make, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(QualityError, match=r"llama\.cpp does not open what format gguf wrote, it says: "):
        llama_cpp.compare(make_model("llama"), tokenizer, tmp_path / "model.gguf", WINDOW)


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no node")
def test_a_broken_installation_is_named(
    make_model: Make, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "node_modules" / "node-llama-cpp").mkdir(parents=True)
    monkeypatch.setenv(llama_cpp.FOLDER, str(tmp_path))
    assert llama_cpp.missing() is None
    with pytest.raises(ResourceError, match="does not start, so install it again: "):
        llama_cpp.compare(make_model("llama"), tokenizer, tmp_path / "model.gguf", WINDOW)
