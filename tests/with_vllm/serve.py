"""Run by the Python of the environment that has vLLM: greedy tokens of an exported folder.

Arguments: the folder, the number of processes that share each layer, and prompts as a JSON list of lists of tokens.
"""

import json
import sys


def main(folder: str, tensor_parallel: str, prompts: str) -> None:
    """Prints one line, `TOKENS` and a JSON list."""
    from vllm import LLM, SamplingParams

    model = LLM(
        model=folder,
        trust_remote_code=True,
        model_impl="transformers",
        dtype="float32",
        tensor_parallel_size=int(tensor_parallel),
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=4,
    )
    given = [{"prompt_token_ids": tokens} for tokens in json.loads(prompts)]
    found = model.generate(given, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    print("TOKENS", json.dumps([list(one.outputs[0].token_ids) for one in found]))


if __name__ == "__main__":
    main(*sys.argv[1:])
