"""Tiny real models, a real tokenizer and real text files, made once for the tests."""

import copy
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test asks the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: a second thread only waits, for long on a busy machine

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import Outcome, snapshot
from tiny import paragraphs, sharpened
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from sparsekd import device
from sparsekd.run import directory, inspection


@pytest.fixture(scope="session", autouse=True)
def processor_without_bfloat16() -> Iterator[None]:
    """Tests compute in float32 by default, whatever processor they run on, and hear no advice about it: figures and
    lines are the same everywhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        for module in (directory, inspection):
            patch.setattr(module, "slow_kernels", lambda device: None)
        yield


@pytest.fixture
def processor_with_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that multiplies bfloat16 four times as fast; on others it is slow, but the numbers are the same."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(device, "bfloat16_gain", lambda: 4.0)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(paragraphs(50, seed=0), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


@pytest.fixture(scope="session")
def gemma_like(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokenizer with a beginning-of-sequence token that it puts before every text by default."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens(["<bos>"])
    bos = backend.token_to_id("<bos>")
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>", bos_token="<bos>"
    )


@pytest.fixture(scope="session")
def make_model(tokenizer: PreTrainedTokenizerFast) -> Callable[..., PreTrainedModel]:
    """Builds a two-layer model of an architecture, or with other sizes; the same weights every time."""

    def make(architecture: str, **changes: Any) -> PreTrainedModel:
        vocab = {"vocab_size": len(tokenizer), "eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0}
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= changes
        grouped = {**vocab, **sizes, "num_key_value_heads": 2}
        config = {
            "llama": lambda: LlamaConfig(**grouped),
            "qwen3": lambda: Qwen3Config(**grouped, head_dim=16),
            "phi3": lambda: Phi3Config(**grouped),
            "gpt2": lambda: GPT2Config(
                **vocab, n_embd=32, n_layer=sizes["num_hidden_layers"], n_head=4, n_positions=256
            ),
            "gpt_neox": lambda: GPTNeoXConfig(**vocab, **sizes),
        }[architecture]()
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()

    return make


@pytest.fixture
def model_folder(
    make_model: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Callable[[str], Path]:
    """Saves a tiny model and its tokenizer."""

    def save(architecture: str) -> Path:
        folder = tmp_path / architecture
        make_model(architecture).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "learn.txt"
    path.write_text("\n\n".join(paragraphs(200, seed=1)))
    return path


@pytest.fixture
def tiny_recipe(model_folder: Callable[[str], Path], text_file: Path, tmp_path: Path) -> Path:
    """A recipe that goes the whole path in seconds, on a held-out part and on another text."""
    (tmp_path / "other.txt").write_text("\n\n".join(paragraphs(20, seed=2)))
    recipe = {
        "model": {"name": str(model_folder("llama")), "dtype": "float32"},  # also in processes of their own
        "corpus": {
            "root": str(tmp_path),
            "sources": {"learn": {"path": text_file.name, "holdout": 0.2}},
            "seq_len": 32,
            "num_blocks": 12,
            "num_validation_blocks": 2,
        },
        "cache": {"top_k": 8, "batch_size": 2},
        "compress": {"num_tokens": 256, "batch_size": 2},
        "distill": {
            "batch_size": 2,
            "micro_batch_size": 2,
            "validations": 2,
            "learning_rate": 1e-3,
            "precision": "float32",
        },
        "evaluate": {
            "texts": {"held": {"holdout_of": "learn"}, "other": {"path": "other.txt"}},
            "context": 64,
            "stride": 32,
            "max_tokens": 256,
            "prompts": ["The quiet river", "A garden"],
        },
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


# ---- the command line


@pytest.fixture
def sparsekd(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Runs the command in this process."""
    from sparsekd import cli

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["sparsekd", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as leave:
            code = int(leave.code or 0)
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture
def refused(sparsekd: Callable[..., Outcome], tmp_path: Path) -> Callable[..., str]:
    """Runs a command that must fail: its last line on stderr is the only message, and nothing old is touched."""

    def run(*arguments: object, error: Any) -> str:
        before = snapshot(tmp_path)
        outcome = sparsekd(*arguments)
        after = snapshot(tmp_path)
        assert {path: after.get(path) for path in before} == before
        assert outcome.code == error.exit_code, outcome
        assert outcome.out == ""
        lines = outcome.err.splitlines()
        assert [line for line in lines if line.startswith("sparsekd: ")] == lines[-1:]
        assert "Traceback" not in outcome.err
        return lines[-1]

    return run


@pytest.fixture
def small_model(
    make_model: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> tuple[Path, PreTrainedModel]:
    """A compressed model, and the folder that it is saved in."""
    import sparsekd

    model = sparsekd.compress(make_model("llama"), reduction=0.3, method="svd")
    sparsekd.save(model, tokenizer, tmp_path / "small")
    return tmp_path / "small", model


# ---- a training: a teacher with something to lose, its cache, and a student that lost it
# sparsekd is imported inside: pytest reads this file before the hook that checks shapes is there


@pytest.fixture
def blocks() -> torch.Tensor:
    return torch.randint(0, 300, (14, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def teacher(make_model: Any) -> PreTrainedModel:
    return sharpened(make_model("llama"))


@pytest.fixture
def cache(teacher: PreTrainedModel, tokenizer: Any, blocks: torch.Tensor, tmp_path: Path) -> Any:
    import sparsekd

    return sparsekd.cache_teacher(teacher, tokenizer, blocks, tmp_path / "cache", top_k=8)


@pytest.fixture
def new_student(teacher: PreTrainedModel, blocks: torch.Tensor) -> Callable[[], PreTrainedModel]:
    import sparsekd

    student = sparsekd.compress(copy.deepcopy(teacher), blocks, reduction=0.5)
    return lambda: copy.deepcopy(student)
