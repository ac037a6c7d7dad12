"""Export a checkpoint to a folder for transformers, or write a checkpoint from a folder."""

import argparse
import shlex
from pathlib import Path

import torch
from transformers.utils import logging

from megatron.remoe.hf import RemoeConfig

from ..runs.running import make_main
from .arguments import SEED, parse_export
from .checkpoints import check_output, new_folder, save
from .evaluate import bound_experts, check_bound
from .hf.opening import open_run, read_folder
from .hf.settings import make_flags, parse_flags, set_bound, vocabulary_flags
from .hf.tokenizer import find_folder_tokenizer, find_training_tokenizer, generation_config
from .hf.weights import convert_model, fill_megatron
from .measuring import compare_models, compute_all_logits
from .megatron_model import build, one_process

TOKENS = 2048  # on which both models are compared
SEQUENCE = 4096  # sequence length for training, if the model has more positions
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

The code next to the weights needs torch and transformers 5.12 or newer.
"""
PAPER = "ReLU routing: [arXiv 2412.14711](https://arxiv.org/abs/2412.14711). "


def random_tokens(config: RemoeConfig) -> torch.Tensor:
    """Return `TOKENS` random tokens of the vocabulary, int64 `[sequences, length]`."""
    length = min(config.max_position_embeddings, TOKENS)
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(config.vocab_size, (TOKENS // length, length), generator=generator)


def export(options: argparse.Namespace) -> None:
    """Export a checkpoint to a folder for transformers.

    Raises:
        UsageError: something is wrong with the flags, the checkpoint or the tokenizer, or the logits differ.
    """
    run = open_run(options.load, options.ckpt_step)
    args, config = run.args, run.config
    tokenizer = find_training_tokenizer(args, options.tokenizer_model, config)
    if tokenizer is None:
        print("no tokenizer: the run had none (NullTokenizer). Give one with --tokenizer-model.", flush=True)
    ids = random_tokens(config)
    logits = compute_all_logits(run.model, ids)
    trained_bound = config.max_experts_per_token or config.num_experts
    if (bound := options.max_experts_per_token) is not None:
        check_bound(f"--load {options.load}", config, bound)
        set_bound(config, bound)
    elif config.num_experts and config.moe_relu_routing and config.max_experts_per_token is None:
        print("vLLM needs a fixed number of experts per token: give --max-experts-per-token.", flush=True)
    model = convert_model(run.model, config)
    checkpoint, parameters = run.name, model.num_parameters()
    del run
    with new_folder(options.save) as aside:
        logging.disable_progress_bar()
        model.generation_config = generation_config(config, tokenizer)
        model.save_pretrained(aside)
        del model
        for path in aside.glob("*.safetensors"):
            path.chmod(0o644)  # safetensors makes it readable by its owner only
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
        written = read_folder(aside, torch.float32)
        with bound_experts(written, bound and trained_bound):
            difference = compare_models(written, logits, ids)
        print(difference, flush=True)
        results = {"checkpoint": checkpoint, "parameters": f"{parameters:,}", "compared with Megatron": difference}
        write_card(aside, args, config, results)
    print(f"wrote {options.save}: {parameters:,} parameters")


def write_card(folder: Path, args: argparse.Namespace, config: RemoeConfig, results: dict[str, str]) -> None:
    """Write README.md about the run and the model; `results` are more rows of its table."""
    if not config.num_experts:
        kind = "dense"
    elif config.moe_relu_routing:
        kind = "ReMoE"
    else:
        kind = "hash-routed MoE" if config.hash_routing else f"top-{config.num_experts_per_tok} MoE"
    rows = {"kind": kind}
    if kind == "ReMoE":
        rows["λ at the end"] = f"{config.router_aux_loss_coef:.6g}"
    seen = getattr(args, "consumed_train_samples", 0) * args.seq_length
    rows |= {"tokens trained on": f"{seen:,}" if seen else "not known"} | results
    table = "\n".join(f"| {row} | {value} |" for row, value in rows.items())
    card = CARD.format(kind=kind, paper=PAPER * (kind == "ReMoE"), table=table)
    (folder / "README.md").write_text(card, encoding="utf-8")


def write_checkpoint(folder: Path, output: Path, tokenizer_model: Path | None) -> None:
    """Write a folder's model as a checkpoint, if the logits of both models agree on random tokens.

    Print the flags of the model.

    Args:
        folder: of an exported model.
        output: folder to write.
        tokenizer_model: folder of a tokenizer to use instead of the model's own.

    Raises:
        ConversionError: the folder is damaged or has a different model; Megatron cannot express it; the logits differ.
    """
    source = read_folder(folder, torch.float32)
    config = source.config
    tokenizer = find_folder_tokenizer(folder, tokenizer_model, config)
    flags = [*make_flags(config, min(SEQUENCE, config.max_position_embeddings)), *vocabulary_flags(config, tokenizer)]
    args = parse_flags(flags, config)
    model = build(args)
    fill_megatron(model, source)
    ids = random_tokens(config)
    print(compare_models(source, compute_all_logits(model, ids), ids))
    del source
    save(model, args, output)
    words = shlex.join(["--pretrained-checkpoint", str(output), *flags])
    print(f"wrote {output}. Train with your flags for data, batch, learning rate and --save, and with:\n{words}")


def run(options: argparse.Namespace) -> None:
    """Write a folder, or with --reverse a checkpoint."""
    check_output(options.save)
    with one_process():
        if options.reverse:
            write_checkpoint(options.load, options.save, options.tokenizer_model)
        else:
            export(options)


main = make_main("export", parse_export, run, "stopped; nothing was written")
