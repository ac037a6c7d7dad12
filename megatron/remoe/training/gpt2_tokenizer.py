"""Makes `--tokenizer-type GPT2BPETokenizer --vocab-file V --merge-file M` work without network.

Megatron's GPT2BPETokenizer asks the Hugging Face hub for "gpt2" even when both files are given. Its
HuggingFaceTokenizer builds the same tokenizer from a folder that holds these files, and asks nobody.
"""

import argparse
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from megatron.remoe.data.errors import DataError
from megatron.remoe.data.gpt2_files import (
    END_OF_TEXT,
    FOLDER_TOKENIZER,
    GPT2_TOKENIZER,
    HOW_TO_GET,
    read_gpt2_vocabulary,
)

TOKENIZER_CONFIG = {
    "tokenizer_class": "GPT2Tokenizer",
    "add_prefix_space": False,
    "clean_up_tokenization_spaces": False,
    "bos_token": END_OF_TEXT,
    "eos_token": END_OF_TEXT,
    "unk_token": END_OF_TEXT,
}
MODEL_CONFIG = {"model_type": "gpt2"}


def use_local_gpt2_files(args: argparse.Namespace) -> None:
    """Have Megatron build GPT2BPETokenizer from --vocab-file and --merge-file alone; other types stay as they are.

    Call it after parsing and before Megatron builds its tokenizer.

    Raises:
        DataError: a file is not given, missing or wrong; the message names flag, path and remedy.
    """
    if args.tokenizer_type != GPT2_TOKENIZER:
        return
    missing = [
        flag for flag, path in (("--vocab-file", args.vocab_file), ("--merge-file", args.merge_file)) if not path
    ]
    if missing:
        raise DataError(
            f"--tokenizer-type {GPT2_TOKENIZER} needs --vocab-file and --merge-file; missing: {', '.join(missing)}. "
            f"Without both, Megatron would ask the Hugging Face hub for them. {HOW_TO_GET}"
        )
    args.tokenizer_model = str(gpt2_tokenizer_folder(args.vocab_file, args.merge_file))
    args.tokenizer_type = FOLDER_TOKENIZER
    # The folder holds both; given once more they would take the place of its own.
    args.vocab_file = args.merge_file = None


def gpt2_tokenizer_folder(
    vocab_file: str | os.PathLike[str],
    merge_file: str | os.PathLike[str],
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """A folder for --tokenizer-type HuggingFaceTokenizer --tokenizer-model, with the vocabulary of the two files.

    Its name is a hash of its contents: it is made once, and any number of processes may ask for it at the same time.

    Args:
        vocab_file: GPT-2's encoder.json or vocab.json.
        merge_file: GPT-2's vocab.bpe or merges.txt.
        cache_dir: where to keep the folder; by default megatron-remoe in the user's cache ($XDG_CACHE_HOME or
            ~/.cache), or in the temporary folder if nothing can be written there.

    Raises:
        DataError: a file is missing or does not hold what it should; the message names flag, path and remedy.
        OSError: `cache_dir` was given and cannot be written.
    """
    read_gpt2_vocabulary(vocab_file, merge_file)
    contents = {
        "vocab.json": Path(vocab_file).read_bytes(),
        "merges.txt": Path(merge_file).read_bytes(),
        "tokenizer_config.json": json.dumps(TOKENIZER_CONFIG, indent=2).encode(),
        "config.json": json.dumps(MODEL_CONFIG).encode(),
    }
    digest = hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents.values())).hexdigest()
    name = f"gpt2-{digest[:16]}"
    if cache_dir is not None:
        return _folder_of(contents, Path(cache_dir) / name)
    home_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron-remoe"
    try:
        return _folder_of(contents, home_cache / name)
    except OSError:
        return _folder_of(contents, Path(tempfile.gettempdir()) / f"megatron-remoe-{os.getuid()}" / name)


def _folder_of(contents: dict[str, bytes], folder: Path) -> Path:
    if _holds(folder, contents):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".tmp-", dir=folder.parent))
    try:
        for name, content in contents.items():
            (aside / name).write_bytes(content)
        aside.chmod(0o755)
        if folder.is_dir() and not _holds(folder, contents):
            shutil.rmtree(folder, ignore_errors=True)  # left by a disk that was full, or edited
        try:
            aside.rename(folder)
        except OSError:
            # Another process was first; what it wrote is the same.
            if not _holds(folder, contents):
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _holds(folder: Path, contents: dict[str, bytes]) -> bool:
    try:
        return all((folder / name).read_bytes() == content for name, content in contents.items())
    except OSError:
        return False
