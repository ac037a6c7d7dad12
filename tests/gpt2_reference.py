"""What Megatron-LM's own preprocessing writes: its builder, and a transformers tokenizer document by document."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from test_tokenizer import gpt2_files

from megatron.remoe.data.tokenizer import gpt2_tokenizer_folder


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
    """Whether two outputs are byte for byte the same."""
    names = [f"_{key}_document.{suffix}" for key in keys for suffix in ("bin", "idx")]
    return all(Path(f"{prefix}{name}").read_bytes() == Path(f"{other}{name}").read_bytes() for name in names)
