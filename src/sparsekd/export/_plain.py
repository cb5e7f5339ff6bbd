"""Opens a folder as somebody does who has torch and transformers, and not this package: run as a script, by its path.

Arguments: the folder, a file of tokens (B x L), the file for their logits (B x L x V), both of numpy.
"""

import sys
from pathlib import Path


def main(folder: str, tokens: str, logits: str) -> None:
    """Computes in float32 with the weights as they are stored."""
    sys.modules["sparsekd"] = None  # type: ignore[assignment] # an import of it is an error from here on

    import json

    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trusts = "auto_map" in json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    AutoTokenizer.from_pretrained(folder, trust_remote_code=trusts)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=trusts).eval()
    with torch.inference_mode():
        found = model(input_ids=torch.from_numpy(np.load(tokens)), use_cache=False).logits
    np.save(logits, found.numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
