"""llama.cpp itself, which the npm package `node-llama-cpp` carries ready built: whether it says of the model in a GGUF
file what PyTorch says.

Shape letters: B windows, L positions.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsekd import corpus
from sparsekd.errors import QualityError, ResourceError
from sparsekd.evaluate import continuations
from sparsekd.export.checking import Comparison, perplexity
from sparsekd.models import logits_of
from sparsekd.records import Record, exponential

FOLDER = "SPARSEKD_LLAMA_CPP"  # the environment variable that names another folder than this
_DEFAULT = Path("~/.cache/sparsekd/llama.cpp")
_INSTALL = "npm install --prefix {} node-llama-cpp@3.22.1"
_LIKELIEST = 8  # of each position: whole vectors take ten times as long to get out of it as to compute
_WINDOWS = 4
_PROMPT, _GENERATED = 32, 16
_NOT_STARTED = 4  # what the script returns then
_TEXT = (
    "It's 1984 -- I'll pay  $12,345.67;\n\n\tdef f(x):\n        return x ** 2  # \u00e9t\u00e9, \u65e5\u672c\u8a9e!\n"
)


@dataclass(frozen=True)
class Found(Comparison):
    """Of llama.cpp with PyTorch in float32. Logits are compared of PyTorch's likeliest tokens and of the next one."""

    logits_per_position: int
    greedy_tokens: int
    greedy_tokens_alike: int  # from the first on
    text_is_split_alike: bool  # a text of digits, spaces and letters that are not ASCII


def folder() -> Path:
    """Where `npm install node-llama-cpp` has been run, or should be."""
    return Path(os.environ.get(FOLDER) or _DEFAULT).expanduser()


def missing() -> str | None:
    """Why llama.cpp cannot be asked, and with which line it is installed; None where it is there."""
    line = install_line()
    return None if line is None else f"llama.cpp was not asked, it is missing: {line}"


def install_line() -> str | None:
    """What installs it; None where it is there."""
    if shutil.which("node") is None:
        return f"install node (https://nodejs.org), then {_INSTALL.format(folder())}"
    return None if (folder() / "node_modules" / "node-llama-cpp").is_dir() else _INSTALL.format(folder())


@torch.inference_mode()
def compare(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: Path, tokens: Int[Tensor, "B L"]
) -> tuple[str, Found]:
    """The version of llama.cpp, and what it makes of the first windows. Raises `QualityError` where it does not open
    the file."""
    tokens = tokens[:_WINDOWS].cpu()
    logits = logits_of(model, input_ids=tokens.to(model.device)).float().cpu()
    following = F.pad(tokens[:, 1:], (0, 1))  # after the last position of a window any token does
    wanted = torch.cat([logits.topk(min(_LIKELIEST, logits.shape[-1])).indices, following[..., None]], dim=-1)
    prompt = tokens[0, :_PROMPT]
    answer = _ask(
        model=str(file),
        threads=torch.get_num_threads(),
        windows=tokens.tolist(),
        wanted=wanted.tolist(),
        prompt=prompt.tolist(),
        generate=_GENERATED,
        text=_TEXT,
    )
    positions = [position for window in answer["windows"] for position in window]
    theirs = torch.tensor([[_number(logit) for logit in position["logits"]] for position in positions])
    theirs = theirs.view(wanted.shape)
    likeliest = torch.tensor([position["best"] for position in positions]).view(tokens.shape)
    normaliser = torch.tensor(
        [_number(position["maximum"]) + math.log(_number(position["total"])) for position in positions]
    )
    surprise = normaliser.view(tokens.shape) - theirs[..., -1]
    text = torch.cat([prompt, torch.tensor(answer["generated"])])[None]
    ours = logits_of(model, input_ids=text.to(model.device))[0, len(prompt) - 1 : -1].argmax(-1)
    found = Found(
        tokens=tokens.numel(),
        largest_logit_difference=float((theirs - logits.gather(-1, wanted)).abs().max()),
        agreement=float((likeliest == logits.argmax(-1)).float().mean()),
        perplexity=exponential(float(surprise[:, :-1].mean())),
        reference_perplexity=perplexity(logits, tokens),
        logits_per_position=wanted.shape[-1],
        greedy_tokens=_GENERATED,
        greedy_tokens_alike=continuations.num_common(ours.tolist(), answer["generated"]),
        text_is_split_alike=answer["tokens"] == corpus.encode(tokenizer, _TEXT),
    )
    return answer["version"], found


def _number(found: float | None) -> float:
    """A number as JSON has it, which has no NaN."""
    return math.nan if found is None else found


def command(script: Path) -> list[str]:
    """What runs a script of ours in node."""
    return [shutil.which("node") or "node", str(script)]


def reason(stderr: str) -> str:
    """The line of a script's stderr that says why it ended."""
    lines = stderr.splitlines() or ["nothing"]
    return next((line for line in lines if "rror" in line), lines[-1]).strip()


def _ask(**asked: Any) -> Any:
    """What the script beside this file answers."""
    done = subprocess.run(  # noqa: S603
        command(Path(__file__).with_name("llama_cpp.mjs")),
        input=json.dumps({"packages": str(folder()), **asked}),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        said = reason(done.stderr)
        if done.returncode == _NOT_STARTED:
            raise ResourceError(f"node-llama-cpp in {folder()} does not start, so install it again: {said}")
        raise QualityError(f"llama.cpp does not open what format gguf wrote, it says: {said}")
    return json.loads(done.stdout)


def as_record(version: str, found: Found) -> Record:
    """For export.json."""
    return {"version": version, **asdict(found)}
