"""Write a model's folder, an exported one or that of a public model, as a checkpoint."""

import importlib.util
import shlex
from collections.abc import Collection
from pathlib import Path

import torch

from megatron.remoe.hf import RemoeConfig

from ...console.display import Display
from ..checkpoints import save
from ..measuring import compare_models, describe_difference
from ..megatron_model import build
from .folder import read_folder
from .public import describe_public
from .settings import make_flags, parse_flags, vocabulary_flags
from .tokenizer import find_folder_tokenizer
from .weights import fill_megatron

SEQUENCE = 4096  # for training, if a public model has that many positions
TOKENS = 512
# Batch size, steps and learning rate are for the user to choose.
PROGRAM = "python pretrain_gpt.py --micro-batch-size 1 --global-batch-size 8 --train-iters 100 --lr 1e-4"
PROGRAM += " --eval-interval 100 --save RUN --load RUN --save-interval 100"


def write_checkpoint(
    folder: Path,
    families: Collection[str],
    output: Path,
    display: Display,
    layers: str | None = None,
    tokenizer_model: Path | None = None,
) -> RemoeConfig:
    """Write a folder's model as a checkpoint, if the logits of both models agree on random tokens.

    Prints the command to continue training.

    Args:
        folder: of a model for transformers.
        families: accepted values of `model_type`.
        output: folder to write.
        display: for the results.
        layers: --transformer-impl that will load the checkpoint (None: the installed one).
        tokenizer_model: folder of a tokenizer to use instead of the model's own.

    Raises:
        ConversionError: it is damaged or no such model; Megatron cannot express it; the logits differ.
    """
    source = read_folder(folder, families, torch.float32)
    is_ours = source.config.model_type == RemoeConfig.model_type
    config = source.config if is_ours else describe_public(source.config)
    tokenizer = find_folder_tokenizer(folder, tokenizer_model, config)
    length = config.max_position_embeddings if is_ours else min(SEQUENCE, config.max_position_embeddings)
    flags = [*make_flags(config, length), *vocabulary_flags(config, tokenizer)]
    args = parse_flags(flags, config)
    model = build(args)
    fill_megatron(model, source, config)
    shape = (1, min(TOKENS, config.max_position_embeddings))
    ids = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(1234))
    display.say(describe_difference(compare_models(source, model, ids), ids, "random tokens"))
    del source
    installed = "transformer_engine" if importlib.util.find_spec("transformer_engine") else "local"
    args.transformer_impl = layers or installed
    save(model, args, output)
    words = ["--data-path", "DATA", "--pretrained-checkpoint", str(output), *flags]
    display.say(f"wrote {output}. Train on from it:\n{PROGRAM} {shlex.join(words)}")
    return config
