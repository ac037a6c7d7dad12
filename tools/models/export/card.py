"""Write the model card of an exported folder."""

import argparse
from pathlib import Path

from megatron.remoe.hf import RemoeConfig

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [remoe, mixture-of-experts]
---

# A {kind} language model

{paper}Trained with Megatron-Core, exported by ReMoE for Megatron.

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=False)  # needs no code
inputs = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

The code beside the weights needs torch and transformers 5.16 or newer.
"""
PAPER = "ReLU routing: [arXiv 2412.14711](https://arxiv.org/abs/2412.14711). "


def write_card(folder: Path, args: argparse.Namespace, config: RemoeConfig, results: dict[str, str]) -> None:
    """Write README.md about the training and the model; `results` are further rows of its table."""
    experts = config.num_experts
    kind = "hash-routed MoE" if config.hash_routing else f"top-{config.num_experts_per_tok} MoE"
    kind = "dense" if not experts else "ReMoE" if config.moe_relu_routing else kind
    rows = {
        "kind": kind,
        "layers, hidden size": f"{config.num_hidden_layers}, {config.hidden_size}",
        "heads, key-value heads": f"{config.num_attention_heads}, {config.num_key_value_heads}",
        "vocabulary (padded), context": f"{config.vocab_size:,}, {config.max_position_embeddings:,}",
    }
    if experts:
        rows["experts, k, expert size"] = f"{experts}, {config.num_experts_per_tok}, {config.moe_intermediate_size}"
    if kind == "ReMoE":
        rows["λ at the end"] = f"{config.router_aux_loss_coef:.6g}"
    seen = getattr(args, "consumed_train_samples", 0) * args.seq_length
    rows |= {"tokens trained on": f"{seen:,}" if seen else "not known"} | results
    table = "\n".join(f"| {row} | {value} |" for row, value in rows.items())
    card = CARD.format(kind=kind, paper=PAPER * (kind == "ReMoE"), table=table)
    (folder / "README.md").write_text(card, encoding="utf-8")
