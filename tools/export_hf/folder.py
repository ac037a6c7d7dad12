"""The folder that transformers loads: weights in shards, configuration, code, tokenizer and card."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from megatron.remoe.hf import RemoeConfig, modeling_remoe

from ..common.hf.tensors import Tensors
from ..common.hf.tokenizer import generation_config

SHARD_BYTES = 2 * 10**9


def write_weights(folder: Path, parts: Iterator[Tensors], shard_bytes: int = SHARD_BYTES) -> int:
    """Write weights as they come, holding one shard at a time.

    Args:
        folder: where to.
        parts: name → tensor, a part of the model each.
        shard_bytes: a file is closed when it has as many, or the part that it is at ends.

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
        names = ["model.safetensors"]
    else:
        weight_map = {key: name for name, keys in zip(names, files, strict=True) for key in keys}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for number, name in enumerate(names):
        (folder / f"{number}.part").rename(folder / name)
    return sum(sum(sizes.values()) for sizes in files)


def write_rest(folder: Path, config: RemoeConfig, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Write all but weights and card: configuration, generation configuration, code and tokenizer."""
    config.save_pretrained(folder)
    shutil.copyfile(modeling_remoe.__file__, folder / Path(modeling_remoe.__file__).name)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    generation_config(config, tokenizer).save_pretrained(folder)
