"""Compute an exported model's loss on given tokens, and generate text, without Megatron and this project.

python alone.py FOLDER PROMPT TOKENS...

TOKENS are files of int64 `[sequences, length + 1]`. The output is JSON: "losses" (a mean per file) and "text".
"""

import importlib.util
import json
import sys

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

SEQUENCES = 32


def loss(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """Return the mean loss over all tokens except the first of each sequence, in nats per token."""
    total = 0.0
    for batch in tokens.split(SEQUENCES):
        logits = model(batch[:, :-1], use_cache=False).logits.flatten(0, 1)
        total += float(cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum"))
    return total / tokens[:, 1:].numel()


if __name__ == "__main__":
    folder, prompt, *files = sys.argv[1:]
    if importlib.util.find_spec("megatron"):
        sys.exit("Megatron is installed here.")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    with torch.inference_mode():
        losses = [loss(model, torch.load(file)) for file in files]
        made = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=20, do_sample=False)
    print(json.dumps({"losses": losses, "text": tokenizer.decode(made[0])}))
