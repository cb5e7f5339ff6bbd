"""Continues a text with the likeliest tokens, in OpenVINO.

pip install openvino numpy tokenizers
python generate.py "Once upon a time" 32

OpenVINO reports its use to Intel unless told not to: opt_in_out --opt_out
"""

import json
import sys
from pathlib import Path

import numpy as np
import openvino
from tokenizers import Tokenizer

FOLDER = Path(__file__).parent


def end_tokens() -> list[int]:
    """The tokens that end a text."""
    path = FOLDER / "generation_config.json"
    found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.exists() else None
    return found if isinstance(found, list) else [] if found is None else [found]


def generate(tokens: list[int], count: int) -> list[int]:
    """Up to `count` tokens that follow; each is fed back together with the cache of all before it."""
    exact = {"INFERENCE_PRECISION_HINT": "f32"}  # without it some processors take bfloat16: faster, but rounded
    request = openvino.compile_model(FOLDER / "openvino_model.xml", "CPU", exact).create_infer_request()
    inputs = {one.get_any_name(): one.get_partial_shape() for one in request.model_inputs}
    past = {
        name: np.zeros((1, heads.get_length(), 0, width.get_length()), np.float32)
        for name, (_, heads, _, width) in ((n, s) for n, s in inputs.items() if n.startswith("past_key_values"))
    }
    ends, new, seen, following = end_tokens(), list(tokens), 0, []
    while len(following) < count and not (following and following[-1] in ends):
        length = seen + len(new)
        given = {
            "input_ids": np.array([new]),
            "attention_mask": np.ones((1, length), np.int64),
            "position_ids": np.arange(seen, length)[None],
            "num_logits_to_keep": np.array(1),  # of the last token, which is all that is needed
        }
        given = {name: array for name, array in given.items() if name in inputs}
        logits, *present = request.infer(given | past).values()
        past = dict(zip(past, present, strict=True))
        seen, new = length, [int(logits[0, -1].argmax())]
        following += new
    return following


if __name__ == "__main__":
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    prompt, count = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 32
    tokens = tokenizer.encode(prompt).ids
    print(tokenizer.decode(tokens + generate(tokens, count)))
