"""Writes the folder that transformers loads: weights in shards, configuration, code, tokenizer and model card."""

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_relative_import_files

from megatron.remoe.hf import RemoeConfig, modeling_remoe

from ..common.hf.folder import INDEX, WEIGHTS
from ..common.hf.tensors import Tensors
from ..common.hf.tokenizer import generation_config
from .check import Check, Text

SHARD_BYTES = 2 * 10**9
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


def write_weights(folder: Path, parts: Iterator[Tensors], shard_bytes: int = SHARD_BYTES) -> int:
    """Write weights, holding one shard at a time.

    Args:
        folder: to write to.
        parts: name → tensor, for one part of the model after the other.
        shard_bytes: a file ends with the part that brings it to this size.

    Returns:
        The number of parameters.
    """
    files: list[dict[str, int]] = []
    pending: Tensors = {}

    def close() -> None:
        path = folder / f"{len(files)}.part"
        save_file(pending, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors lets nobody else read it
        files.append({name: tensor.numel() for name, tensor in pending.items()})
        pending.clear()

    total = 0
    for part in parts:
        # A copy each: safetensors refuses views of one storage.
        pending |= {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in part.items()}
        total += sum(tensor.nbytes for tensor in part.values())
        if sum(tensor.nbytes for tensor in pending.values()) >= shard_bytes:
            close()
    if pending:
        close()
    names = [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    if len(files) == 1:
        names = [WEIGHTS]
    else:
        weight_map = {key: name for name, keys in zip(names, files, strict=True) for key in keys}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for number, name in enumerate(names):
        (folder / f"{number}.part").rename(folder / name)
    return sum(sum(sizes.values()) for sizes in files)


def write_settings(folder: Path, config: RemoeConfig, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Write all but weights and card: configuration, generation configuration, code and tokenizer."""
    config.save_pretrained(folder)
    for file in [modeling_remoe.__file__, *get_relative_import_files(modeling_remoe.__file__)]:
        shutil.copyfile(file, folder / Path(file).name)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    generation_config(config, tokenizer).save_pretrained(folder)


def write_card(
    folder: Path, args: argparse.Namespace, config: RemoeConfig, name: str, parameters: int, text: Text, check: Check
) -> None:
    """Write README.md.

    Args:
        folder: to write to.
        args: Megatron's, of the training.
        config: of the model.
        name: of the checkpoint.
        parameters: their number.
        text, check: the comparison at the export.
    """
    experts = config.num_experts
    kind = "hash-routed MoE" if config.hash_routing else f"top-{config.num_experts_per_tok} MoE"
    kind = "dense" if not experts else "ReMoE" if config.moe_relu_routing else kind
    rows = {
        "kind": kind,
        "parameters": f"{parameters:,}",
        "layers, hidden size": f"{config.num_hidden_layers}, {config.hidden_size}",
        "heads, key-value heads": f"{config.num_attention_heads}, {config.num_key_value_heads}",
        "vocabulary (padded), context": f"{config.vocab_size:,}, {config.max_position_embeddings:,}",
    }
    if experts:
        rows["experts, k, expert size"] = f"{experts}, {config.num_experts_per_tok}, {config.moe_intermediate_size}"
    if kind == "ReMoE":
        rows["sparsity, target"] = f"{check.sparsity:.4f}, {1 - config.num_experts_per_tok / experts:.4f}"
        rows["λ at the end"] = f"{config.router_aux_loss_coef:.6g}"
    seen = getattr(args, "consumed_train_samples", 0) * args.seq_length
    rows |= {
        "checkpoint": name,
        "tokens trained on": f"{seen:,}" if seen else "not known",
        f"loss on {text.tokens[:, 1:].numel():,} {text.name}": f"{check.loss:.4f} nats per token",
        "largest difference of logits from Megatron's": f"{check.difference:.1e} of the largest",
    }
    table = "\n".join(f"| {row} | {value} |" for row, value in rows.items())
    card = CARD.format(kind=kind, paper=PAPER * (kind == "ReMoE"), table=table)
    (folder / "README.md").write_text(card, encoding="utf-8")
