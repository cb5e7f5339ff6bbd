"""What a micro batch costs: packed documents, the form of the logits, padded vocabularies, number formats."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training import OPTIONS, data
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, PreTrainedModel, masking_utils

import sparsekd
from sparsekd import distillation
from sparsekd import teacher as teacher_stage
from sparsekd.distillation import objective
from sparsekd.errors import DataError, MismatchError, UsageError
from sparsekd.models import document_positions
from sparsekd.teacher import Cache, Online, distributions

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
END = 0  # the token that ends a document here


def packed() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A block of three documents, and the documents alone."""
    generator = torch.Generator().manual_seed(3)
    documents = [torch.randint(1, 300, (length,), generator=generator) for length in (7, 1, 10)]
    documents = [torch.cat([document, torch.tensor([END])]) for document in documents]
    return torch.cat(documents), documents


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3", "gpt2", "gpt_neox"])
def test_masked_documents_have_the_logits_of_the_documents_alone(architecture: str, make_model: Any) -> None:
    model = make_model(architecture)
    block, documents = packed()
    positions = document_positions(block[None], END)
    assert positions[0].tolist() == [*range(8), *range(2), *range(11)]
    together = model(block[None], position_ids=positions, use_cache=False).logits[0]
    alone = torch.cat([model(document[None]).logits[0] for document in documents])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(block[None]).logits[0, 8:], alone[8:], rtol=1e-3, atol=1e-3)
    objective.require_document_mask(model)


def test_masked_documents_cost_what_the_documents_alone_cost(teacher: PreTrainedModel, new_student: Any) -> None:
    """Teacher and student both keep them apart, and nothing is asked of the token before another document's first."""
    block, documents = packed()
    alone = [document.numpy() for document in documents]
    together = distillation.Data(
        [block.numpy()], lambda _: np.arange(1), [0], Online(teacher, 8, separator=END), separator=END
    )
    apart = distillation.Data(alone, lambda _: np.arange(3), [0, 1, 2], Online(teacher, 8))
    assert together.num_positions([0]) == apart.num_positions([0, 1, 2]) == 7 + 1 + 10
    masked = distillation.measure(new_student(), together, OPTIONS)
    single = distillation.measure(new_student(), apart, OPTIONS)
    for key in ("loss", "kd", "ce", "agreement"):
        assert getattr(masked, key) == pytest.approx(getattr(single, key), rel=1e-4)
    unmasked = distillation.measure(new_student(), replace(together, separator=None), OPTIONS)
    assert unmasked.ce != pytest.approx(masked.ce, rel=1e-3)


def test_a_cache_of_masked_documents_has_their_own_distributions(teacher: PreTrainedModel, tmp_path: Path) -> None:
    block, documents = packed()
    cache = teacher_stage.fill(
        teacher,
        tmp_path / "cache",
        {0: block.numpy().astype(np.int32)},
        tokenizer_hash="t",
        corpus_fingerprint="c",
        top_k=8,
        separator=END,
    )
    last = distributions(teacher, documents[2][None], 8)[0]
    read = cache.read(0, block.numpy().astype(np.int32))
    torch.testing.assert_close(read.log_probs[-10:], last.log_probs, rtol=1e-2, atol=1e-2)


def test_a_model_that_does_not_keep_documents_apart_is_refused(make_model: Any) -> None:
    model = make_model("llama")
    forward = model.forward
    model.forward = lambda *args, position_ids=None, **kwargs: forward(*args, **kwargs)
    with pytest.raises(UsageError, match=r"corpus\.document_mask: LlamaForCausalLM does not keep"):
        objective.require_document_mask(model)


CONFIGS = {
    "scaled": lambda v: GraniteConfig(vocab_size=v, **SIZES, logits_scaling=4.0),
    "multiplied": lambda v: CohereConfig(vocab_size=v, **SIZES, logit_scale=0.25),
    "capped": lambda v: Gemma2Config(
        vocab_size=v, **SIZES, num_key_value_heads=2, head_dim=16, final_logit_softcapping=5.0
    ),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_scaled_and_capped_logits_are_seen_by_the_loss(
    kind: str, tokenizer: Any, blocks: torch.Tensor, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](len(tokenizer)), attn_implementation="eager").eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    head = objective.find_head(model)
    assert head.fused
    cache = sparsekd.cache_teacher(model, tokenizer, blocks, tmp_path / "cache", top_k=8)
    measured = distillation.measure(model, data(blocks, cache), replace(OPTIONS, alpha=1.0))
    assert abs(measured.kd) < 1e-4  # the loss saw the logits that the cache saw
    assert measured.agreement == 1.0


def test_logits_of_another_form_are_taken_whole(make_model: Any, blocks: torch.Tensor) -> None:
    model = make_model("llama")
    model.lm_head = torch.nn.Linear(32, model.config.vocab_size, bias=True)
    torch.nn.init.normal_(model.lm_head.bias)
    assert not objective.find_head(model).fused
    measured = distillation.measure(model, data(blocks, Online(model, 8)), OPTIONS)
    assert abs(measured.kd) < 1e-5
    assert measured.agreement == 1.0


@pytest.mark.parametrize(("padded", "rows"), [("student", 60), ("student", 5000), ("teacher", 60)])
def test_padded_embeddings_of_one_family_are_cut(padded: str, rows: int, make_model: Any, blocks: torch.Tensor) -> None:
    size = make_model("llama").config.vocab_size
    small = make_model("llama")
    large = make_model("llama")
    large.resize_token_embeddings(size + rows, mean_resizing=False)
    with torch.no_grad():  # rows that would take most of the probability if they were counted
        large.lm_head.weight[size:] = 0
        large.lm_head.weight[:size] = small.lm_head.weight
        large.model.embed_tokens.weight[:size] = small.model.embed_tokens.weight
    student, teacher = (large, small) if padded == "student" else (small, large)
    both = data(blocks, Online(teacher, 8))
    measured = distillation.measure(student, both, replace(OPTIONS, alpha=1.0))
    assert measured.agreement == 1.0
    if padded == "student":
        assert abs(measured.kd) < 1e-5


def test_other_vocabularies_are_refused(make_model: Any, blocks: torch.Tensor, cache: Cache) -> None:
    other = make_model("llama")
    other.resize_token_embeddings(400 + 1024, mean_resizing=False)
    with pytest.raises(MismatchError, match="the teacher has a vocabulary of 1424 tokens, the student one of 400"):
        distillation.train(make_model("llama"), data(blocks, Online(other, 8)), OPTIONS)
    small = make_model("llama")
    small.resize_token_embeddings(250, mean_resizing=False)
    with pytest.raises(DataError, match="not in the vocabulary of 250 that teacher and student share"):
        distillation.train(small, data(blocks, cache), OPTIONS)


def test_gemmas_vocabulary_is_cached_and_learned(make_model: Any, tmp_path: Path) -> None:
    """262,208 embeddings for 262,145 tokens: the likeliest of all is the last."""
    model = make_model("llama", vocab_size=262_208, hidden_size=8, intermediate_size=16, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[262_144] = 100 * model.lm_head.weight[262_143]
    blocks = {0: np.arange(262_100, 262_112, dtype=np.int32), 1: np.arange(262_133, 262_145, dtype=np.int32)}
    options = {"tokenizer_hash": "t", "corpus_fingerprint": "c", "top_k": 8, "vocab_size": 262_145}
    cached = teacher_stage.fill(model, tmp_path, blocks, **options)
    assert cached is not None
    assert int(cached.read(1, blocks[1]).ids.max()) == 262_144
    both = distillation.Data(list(blocks.values()), lambda _: np.arange(1), [1], cached)
    measured = distillation.measure(model, both, replace(OPTIONS, alpha=1.0))
    assert measured.agreement == 1.0
    assert abs(measured.kd) < 1e-4


def test_bfloat16_trains_when_asked_for(new_student: Any, blocks: torch.Tensor, cache: Cache) -> None:
    from sparsekd.device import trains_in_bfloat16

    assert not trains_in_bfloat16("auto", torch.device("cpu"))
    options = replace(OPTIONS, alpha=1.0, precision="bfloat16")
    student = new_student()
    history = distillation.train(student, data(blocks, cache, (0, 1, 2, 3)), options)
    exact = distillation.train(new_student(), data(blocks, cache, (0, 1, 2, 3)), replace(options, precision="float32"))
    assert all(parameter.dtype == torch.float32 for parameter in student.parameters())
    assert history.steps[0].loss != exact.steps[0].loss
    assert history.steps[0].loss == pytest.approx(exact.steps[0].loss, rel=0.05)
    assert history.validations[-1].kd < 0.8 * history.validations[0].kd


class Waits(TorchDispatchMode):
    """What would make the host wait for a GPU while it is on: a number read off the device, or a size it decides."""

    NAMES = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero"})

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(one, torch.Tensor) and one.dtype == torch.bool for one in tree_leaves(args[1:])
        )
        if name in self.NAMES or by_mask:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fused", [True, False])
def test_a_micro_batch_lets_the_host_run_ahead(
    fused: bool, new_student: Any, blocks: torch.Tensor, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers' own look, one for each pass: do the positions start again?
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    student = new_student()
    measured = objective.Objective(student, OPTIONS, cache.vocab_size)
    measured._head = measured._head._replace(fused=fused)
    everything = data(blocks, cache)
    batch = distillation.make_batch(everything, [0, 1], measured.vocab_size)
    with Waits() as waits:
        measured(batch, 46).total.backward()
        with torch.no_grad():
            measured(batch, 46)
    assert not waits.seen
    with Waits() as waits:
        assert bool(batch.labels.nonzero().any())
    assert waits.seen == ["nonzero", "_local_scalar_dense"]
