"""Make `--tokenizer-type GPT2BPETokenizer --vocab-file V --merge-file M` work without network.

Megatron's GPT2BPETokenizer asks the Hugging Face hub for "gpt2" even if both files are given. Its
HuggingFaceTokenizer builds the same tokenizer from a folder with these files, without network.
"""

import argparse
import hashlib
import json
import os
from functools import partial
from pathlib import Path

from megatron.remoe.files.files import find_cache_folder, write_atomically
from megatron.remoe.files.gpt2_files import END_OF_TEXT, FOLDER_TOKENIZER, GPT2_TOKENIZER, read_gpt2_vocabulary

TOKENIZER_CONFIG = {
    "tokenizer_class": "GPT2Tokenizer",
    "add_prefix_space": False,
    "clean_up_tokenization_spaces": False,
    **dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
}
Place = str | os.PathLike[str]


def use_local_gpt2_files(args: argparse.Namespace) -> None:
    """Let Megatron build GPT2BPETokenizer from --vocab-file and --merge-file only; leave other types unchanged.

    Call it after parsing and before Megatron builds its tokenizer.

    Raises:
        DataError: a file is not given, missing or wrong; the message names flag, path and remedy.
    """
    if args.tokenizer_type == GPT2_TOKENIZER:
        args.tokenizer_model = str(gpt2_tokenizer_folder(args.vocab_file, args.merge_file))
        args.tokenizer_type = FOLDER_TOKENIZER
        # Megatron would prefer the flags to the folder, so clear them. Tools on machines without the folder need paths.
        args.gpt2_files = [os.path.abspath(args.vocab_file), os.path.abspath(args.merge_file)]
        args.vocab_file = args.merge_file = None


def gpt2_tokenizer_folder(vocab_file: Place | None, merge_file: Place | None) -> Path:
    """Return a folder with these files for --tokenizer-type HuggingFaceTokenizer --tokenizer-model.

    It is in the cache folder. Its name is a hash of its contents. Several processes can call this at the same time.

    Args:
        vocab_file: GPT-2's encoder.json or vocab.json.
        merge_file: GPT-2's vocab.bpe or merges.txt.

    Raises:
        DataError: a file is missing or wrong; the message names flag, path and remedy.
    """
    read_gpt2_vocabulary(vocab_file, merge_file)
    assert vocab_file and merge_file, "it refuses them otherwise"
    contents = {
        "vocab.json": Path(vocab_file).read_bytes(),
        "merges.txt": Path(merge_file).read_bytes(),
        "tokenizer_config.json": json.dumps(TOKENIZER_CONFIG, indent=2).encode(),
        "config.json": json.dumps({"model_type": "gpt2"}).encode(),
    }
    digest = hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents.values())).hexdigest()
    return _write_missing(contents, find_cache_folder() / f"gpt2-{digest[:16]}")


def _write_missing(contents: dict[str, bytes], folder: Path) -> Path:
    """Write the files that are missing or differ, each under a temporary name that is then renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != content:
            write_atomically(path, partial(Path.write_bytes, data=content))
    return folder
