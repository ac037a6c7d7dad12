"""README.md of an exported model: what is known of the run."""

import argparse

from megatron.remoe.hf import RemoeConfig

from .check import Check, Text

USE = """
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=False)  # needs none, and asks nothing
inputs = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```
"""


def write_card(
    args: argparse.Namespace, config: RemoeConfig, name: str, parameters: int, text: Text, check: Check
) -> str:
    """The card.

    Args:
        args: Megatron's, of the training.
        name: of the checkpoint.
        parameters: how many there are.
        text, check: what was measured at the export.
    """
    kind = "hash-routed MoE" if config.hash_routing else f"top-{config.num_experts_per_tok} MoE"
    kind = "dense" if not config.num_experts else "ReMoE" if config.moe_relu_routing else kind
    rows = {
        "kind": kind,
        "parameters": f"{parameters:,}",
        "layers, hidden size": f"{config.num_hidden_layers}, {config.hidden_size}",
        "heads, key-value heads": f"{config.num_attention_heads}, {config.num_key_value_heads}",
        "vocabulary (padded), context": f"{config.vocab_size:,}, {config.max_position_embeddings:,}",
    }
    if config.num_experts:
        rows["experts, k, expert size"] = (
            f"{config.num_experts}, {config.num_experts_per_tok}, {config.moe_intermediate_size}"
        )
    if config.num_experts and config.moe_relu_routing:
        measured = "not measured" if check.sparsity is None else f"{check.sparsity:.4f}"
        rows["sparsity, target"] = f"{measured}, {1 - config.num_experts_per_tok / config.num_experts:.4f}"
        rows["λ at the end"] = f"{config.router_aux_loss_coef:.6g}"
    seen = getattr(args, "consumed_train_samples", 0) * args.seq_length
    rows |= {
        "checkpoint": name,
        "tokens trained on": f"{seen:,}" if seen else "not known",
        f"loss on {text.tokens[:, 1:].numel():,} {text.name}": (
            "not measured" if check.loss is None else f"{check.loss:.4f} nats per token"
        ),
        "largest difference of logits from Megatron's": f"{check.difference:.1e} of the largest",
    }
    table = "\n".join(f"| {row} | {value} |" for row, value in rows.items())
    head = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [remoe, mixture-of-experts]\n---\n"
    paper = "ReLU routing: [arXiv 2412.14711](https://arxiv.org/abs/2412.14711). " if kind == "ReMoE" else ""
    return (
        f"{head}\n# A {kind} language model\n\n{paper}Trained with Megatron-Core, exported by ReMoE for Megatron.\n\n"
        f"| | |\n|---|---|\n{table}\n{USE}\nThe code beside the weights needs torch and transformers 5.16 or newer.\n"
    )
