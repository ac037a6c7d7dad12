"""Write a folder from a checkpoint, or a checkpoint from a folder."""

import argparse
import shlex
from collections.abc import Iterator, Sequence

import torch
from transformers.utils import logging

from ...console.display import Display
from ...console.errors import ConversionError
from ...runs.running import run_tool
from ..checkpoints import check_output, load, new_folder, save
from ..hf.folder import read_config, read_tensors
from ..hf.opening import open_model
from ..hf.settings import complete, flags_of, parse_flags, vocabulary_flags
from ..hf.source import open_run
from ..hf.tensors import Tensors, model_of, shapes_of
from ..hf.tokenizer import generation_config, tokenizer_of
from ..hf.weights import fill, read
from ..megatron_model import build, one_process
from .arguments import parse_arguments
from .card import write_card
from .check import compare, described, megatron_logits, text_for

SHARD = "2GB"
# Batch size, steps and learning rate are for the user to choose.
PROGRAM = "python pretrain_gpt.py --micro-batch-size 1 --global-batch-size 8 --train-iters 100 --lr 1e-4"
PROGRAM += " --eval-interval 100 --save RUN --load RUN --save-interval 100"


def export(options: argparse.Namespace, display: Display) -> None:
    """Write a folder from a checkpoint.

    Raises:
        ConversionError: something is wrong with the flags, the checkpoint or the tokenizer, or the logits differ.
    """
    checkpoint, args, config = open_run(options.load, options.ckpt_step)
    tokenizer = tokenizer_of(args, options.tokenizer_model, config)
    if tokenizer is None:
        display.say("no tokenizer: the training had none (NullTokenizer). Give one with --tokenizer-model.")
    text = text_for(args, options.data_path, config)
    assert isinstance(config.dtype, torch.dtype)
    parameters = sum(shape.numel() for shape in shapes_of(config).values())
    # Megatron loads its model itself; only one of both models is in memory at a time.
    model = build(complete(checkpoint.args))
    load(checkpoint, model)
    logits = megatron_logits(model, text)
    del model
    with new_folder(options.save, parameters * config.dtype.itemsize) as aside:
        with display.step("reading weights", config.num_hidden_layers + 1):
            exported = model_of(config, _counted(read(checkpoint, config), display))
        logging.disable_progress_bar()  # transformers shows one of its own
        exported.generation_config = generation_config(config, tokenizer)
        exported.save_pretrained(aside, max_shard_size=SHARD)
        del exported
        for path in aside.glob("*.safetensors"):
            path.chmod(0o644)  # safetensors makes it readable by its owner only
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
        written = read_config(aside)
        check = compare(model_of(written, read_tensors(aside, written), torch.float32), logits, text)
        display.say(described(check, text))
        write_card(aside, args, config, checkpoint.name, parameters, text, check)
    display.say(f"wrote {options.save}: {parameters:,} parameters")


def reverse(options: argparse.Namespace, display: Display) -> None:
    """Write a checkpoint from a folder.

    Raises:
        ConversionError: something is wrong with the flags or the folder, or the logits differ.
    """
    if not (options.load / "config.json").is_file():
        raise ConversionError(f"--load {options.load}: has no config.json. Give a folder that this tool has exported.")
    source, tokenizer, _ = open_model(options.load, None, options.tokenizer_model, needs_tokenizer=False, device="cpu")
    config = source.config
    source = source.float()
    flags = [*flags_of(config), *vocabulary_flags(config, tokenizer)]
    args = parse_flags(flags, config)
    text = text_for(args, options.data_path, config)
    model = build(args)
    fill(model, source)
    display.say(described(compare(source, megatron_logits(model, text), text), text))
    del source
    args.transformer_impl = options.transformer_impl
    save(model, args, options.save)
    words = ["--data-path", *(options.data_path or ["DATA"]), "--pretrained-checkpoint", str(options.save), *flags]
    display.say(f"wrote {options.save}. Train on from it:\n{PROGRAM} {shlex.join(words)}")


def _counted(parts: Iterator[Tensors], display: Display) -> Iterator[Tensors]:
    for part in parts:
        yield part
        display.advance(1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0; 1 if it cannot be done; 130 if it was stopped."""
    options = parse_arguments(arguments)

    def work() -> None:
        with one_process():
            check_output(options.save)
            (reverse if options.reverse else export)(options, Display())

    return run_tool("export", work, "stopped; nothing was written")
