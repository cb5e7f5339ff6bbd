"""A model that was trained with a token before every text, as Gemma and Llama were, sees it wherever it runs."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2Model

from sparsekd import pipeline
from sparsekd.recipe import load_recipe

TASK = "local_lambada"


def test_every_pass_of_a_gemma_begins_with_its_token(
    gemma_like: Any, tiny_recipe: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    folder = tmp_path / "gemma"
    vocab = {"vocab_size": len(gemma_like), "bos_token_id": gemma_like.bos_token_id, "eos_token_id": 0}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    heads = {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    AutoModelForCausalLM.from_config(Gemma2Config(**vocab, **sizes, **heads)).save_pretrained(folder)
    gemma_like.save_pretrained(folder)
    (tmp_path / "tasks").mkdir()
    row = {"context": "A letter lay on the", "continuation": "table"}
    (tmp_path / "tasks/lambada_openai_test.jsonl").write_text(json.dumps(row) + "\n")
    values = yaml.safe_load(tiny_recipe.read_text())
    values["model"] = {"name": str(folder)}
    values["compress"] |= {"method": "two-sided", "allocation": "global"}
    values["evaluate"]["tasks"] = [TASK]
    tiny_recipe.write_text(yaml.safe_dump(values))

    first = Counter[bool]()
    forward = Gemma2Model.forward

    def watched(self: Any, input_ids: Any = None, **options: Any) -> Any:
        ids = input_ids[0].tolist()
        # else it is the sample that is asked how logits are made, the prompt that is timed, or a model that says more
        goes_on = options.get("past_key_values") is not None
        if ids[:8] != list(range(len(ids)))[:8] and not goes_on:
            first[ids[0] == gemma_like.bos_token_id and gemma_like.bos_token_id not in ids[1:]] += 1
        return forward(self, input_ids=input_ids, **options)

    monkeypatch.setattr(Gemma2Model, "forward", watched)
    pipeline.run(load_recipe(str(tiny_recipe)), tmp_path / "run")
    assert first[True] > 50 and first[False] == 0
    scored = json.loads((tmp_path / "run/dense/tasks/stage.json").read_text())
    assert scored["scores"][TASK]["num_rows"] == 1
