"""Compressed models of each form to export, and a process that has transformers and cannot import sparsekd."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import made
from narrowing import chosen, narrow
from tiny import sharpened
from transformers import PreTrainedModel

_STEPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "depth+width": ({"method": "shortgpt"}, {"method": "activation"}),
    "depth+lowrank": ({"method": "shortgpt"}, {"method": "svd"}),
    "widths+lowrank": ({"method": "neurons", "multiple": 2}, {"method": "svd"}),
    "widths+mask": ({"method": "neurons", "multiple": 2}, {"method": "magnitude"}),
}
TOKENS = torch.randint(0, 400, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def make() -> Callable[..., PreTrainedModel]:
    """A model of an architecture in a form: dense, width (one), widths, depth, lowrank, pivot, mask, or two of them as
    in `_STEPS`; with biases that are not zero where there are any, and the same weights every time."""
    import sparsekd

    dense: dict[str, Any] = {}

    def make(architecture: str, form: str) -> PreTrainedModel:
        if architecture not in dense:
            torch.manual_seed(0)
            dense[architecture] = sharpened(made(architecture, vocab_size=400)).eval()
            with torch.no_grad():
                for name, parameter in dense[architecture].named_parameters():
                    if name.endswith("bias"):
                        parameter.normal_(std=0.1)
        model = copy.deepcopy(dense[architecture])
        if form == "width":
            narrow(model, chosen(model, 32))
        elif form == "widths":
            narrow(model, chosen(model, 32, 40, 17, 33))
        elif form == "depth":
            sparsekd.compress(model, TOKENS, reduction=0.5, method="shortgpt")
        elif form == "mask":
            sparsekd.compress(model, reduction=0.5, method="magnitude")
        elif form in _STEPS:
            first, last = ({"reduction": 0.25, **step} for step in _STEPS[form])
            tokens = torch.randint(0, 400, (40, 32), generator=torch.Generator().manual_seed(1))
            sparsekd.compress(model, tokens, first=[first], **last)
        elif form != "dense":
            sparsekd.compress(model, reduction=0.3, method="svd", format=form)
        return model

    return make


@pytest.fixture
def logits() -> Callable[[Any], torch.Tensor]:
    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(TOKENS, use_cache=False).logits

    return logits


@pytest.fixture
def without_sparsekd(tmp_path: Path) -> Callable[..., str]:
    """Runs Python that cannot import sparsekd, in a folder of its own; returns what it prints."""

    def run(code: str, *arguments: object, folder: Path = tmp_path) -> str:
        blocked = 'import sys; sys.modules["sparsekd"] = None\n'
        done = subprocess.run(
            [sys.executable, "-c", blocked + code, *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "Do you wish to run" not in done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture
def opened_plainly(without_sparsekd: Callable[..., str]) -> Callable[..., dict[Path, Any]]:
    """What plain transformers says of folders, all in one process: classes, logits, and what happens without trust."""
    code = """
import json, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
tokens = torch.tensor(json.loads(sys.argv[1]))
for folder in sys.argv[2:]:
    refused = None
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        refused = str(error)
    trust = {"trust_remote_code": True} if refused else {}
    AutoTokenizer.from_pretrained(folder, **trust)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **trust).eval()
    inner, info = AutoModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **trust)
    with torch.no_grad():
        values = model(tokens, use_cache=False).logits
        states = inner.eval()(tokens, use_cache=False).last_hidden_state
        assert torch.equal(states, model.base_model(tokens, use_cache=False).last_hidden_state)
    assert not info["missing_keys"] and type(inner) is type(model.base_model), info
    assert model.generate(tokens[:1], max_new_tokens=3, do_sample=False).shape == (1, tokens.shape[1] + 3)
    plan = model.config.base_model_tp_plan
    print(json.dumps([folder, type(model).__name__, refused, values.tolist(), plan]))
"""

    def run(*folders: Path) -> dict[Path, Any]:
        said = without_sparsekd(code, json.dumps(TOKENS.tolist()), *folders)
        lines = map(json.loads, said.splitlines())
        return {
            Path(folder): {"class": name, "refused": refused, "logits": torch.tensor(values), "plan": plan}
            for folder, name, refused, values, plan in lines
        }

    return run


@pytest.fixture(scope="module")
def exported(
    request: pytest.FixtureRequest, make_model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[PreTrainedModel, Path, Any]]:
    """A model of `serving.MODELS`, its folder in the format that the module tests, its `format_`, and the record of it;
    each is made once."""
    from serving import model_named

    from sparsekd.export import Source, export

    made: dict[str, tuple[PreTrainedModel, Path, Any]] = {}
    kind = request.module.format_.__name__.rpartition(".")[2]

    def get(name: str) -> tuple[PreTrainedModel, Path, Any]:
        if name not in made:
            model, folder = model_named(name, make_model), tmp_path_factory.mktemp(kind) / "out"
            made[name] = model, folder, export(model, tokenizer, kind, folder, Source("tiny"), weights="float32")
        return made[name]

    return get
