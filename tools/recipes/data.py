"""Find the data sets and the vocabulary of a training run from environment variables."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron.remoe.files.gpt2_files import GPT2_FILES

from ..console.flags import group_by_flag
from .layout import RecipeError

PLACEHOLDER = "PREFIX"  # stands for the data in a dry run without data
SPLITS = ("969,30,1", "98,1,1", "90,5,5", "80,10,10", "34,33,33")  # the paper's first; each next needs fewer documents
_WEIGHT = r"[0-9.]+(?:e[+-]?[0-9]+)?"  # of a data set
_SHARD = re.compile(r"(?:pile_)?([0-2]\d)_text_document")


def is_set(environment: Mapping[str, str], name: str) -> bool:
    """Return whether a switch such as DRY_RUN is on."""
    return environment.get(name, "") not in ("", "0")


def find_data(environment: Mapping[str, str], is_dry_run: bool) -> list[str]:
    """Return the words for --data-path, weights included.

    Args:
        environment: has DATA_PATH or DATA_DIR.
        is_dry_run: nothing is trained, so no data need to be given.

    Raises:
        RecipeError: neither variable is set and this is no dry run, or DATA_DIR has no data set or a shard twice.
    """
    if given := environment.get("DATA_PATH"):
        return add_weights(split_data_path(given))
    if given := environment.get("DATA_DIR"):
        return find_data_sets(given)
    if is_dry_run:
        return [PLACEHOLDER]
    raise RecipeError("no data: set DATA_PATH to a prefix of .bin/.idx, or DATA_DIR to a folder of them")


def split_data_path(given: str) -> list[str]:
    """Return weights and prefixes. `given` is a prefix, or words of both, or lines of "[weight] prefix"."""
    if os.path.isfile(f"{given}.bin"):
        return [given]
    if "\n" in given:
        lines = [re.fullmatch(rf"(?:({_WEIGHT})[ \t]+)?(.*)", line.strip(" \t")) for line in given.split("\n")]
        return [word for line in lines if line is not None for word in line.groups() if word]
    return given.split()


def add_weights(words: list[str]) -> list[str]:
    """Weight several data sets by the bytes of their .bin files, unless there are weights or a file is missing.

    Without weights, Megatron reads each data set once: longer training or evaluation would run out of data.
    """
    files = [Path(f"{word}.bin") for word in words]
    if len(words) == 1 or not all(file.is_file() for file in files):
        return words
    return [word for file, prefix in zip(files, words, strict=True) for word in (str(file.stat().st_size), prefix)]


def find_data_sets(folder: str) -> list[str]:
    """Return the data sets of a folder, each with a weight of 1.0 if there are several.

    If the Pile's shards 01 to 29 are all there, the rest is left out, as in the authors' fork.

    Raises:
        RecipeError: there are none, or a shard is there under two names.
    """
    names = sorted(path.name.removesuffix(".bin") for path in Path(folder).glob("[!.]*_document.bin") if path.is_file())
    if not names:
        raise RecipeError(f"no *_document.bin in DATA_DIR={folder}: make them with remoe preprocess")
    shards = {name: match[1] for name in names if (match := _SHARD.fullmatch(name))}
    numbers = [*shards.values()]
    if twice := sorted({number for number in numbers if numbers.count(number) > 1}):
        raise RecipeError(f"DATA_DIR={folder} has shard {twice[0]} twice, and both would be trained on: move one away")
    pile = [name for name, number in shards.items() if number != "00"]
    prefixes = [f"{folder}/{name}" for name in (pile if len(pile) == 29 else names)]
    return prefixes if len(prefixes) == 1 else [word for prefix in prefixes for word in ("1.0", prefix)]


def missing_shards(data_path: Sequence[str]) -> list[str]:
    """Return the numbers of the Pile's shards 01 to 29 that are not there, if some are."""
    there = {match[1] for word in data_path if (match := _SHARD.fullmatch(Path(word).name))}
    missing = [number for number in map("{:02}".format, range(1, 30)) if number not in there]
    return missing if there and len(missing) < 29 else []


def cache_name(data_path: Sequence[str]) -> str:
    """Return the folder of Megatron's indices: it has the data's size, because Megatron's names do not."""
    files = [Path(f"{word}.{end}") for word in data_path for end in ("bin", "idx")]
    size = sum(file.stat().st_size for file in files if file.is_file())
    return f"cache/{size}" if size else "cache"


def choose_split(data_path: Sequence[str]) -> str:
    """Return the paper's --split, or one that leaves no part empty if there are few documents.

    Args:
        data_path: weights and prefixes. If a data set cannot be read, the paper's split is returned; the run says why.
    """
    from megatron.remoe.files.errors import DataError
    from megatron.remoe.files.indexed import IndexedReader

    try:
        prefixes = [Path(word) for word in data_path if not re.fullmatch(_WEIGHT, word)]
        counts = [len(IndexedReader(prefix, thorough=False).lengths) for prefix in prefixes]
    except (DataError, OSError):
        return SPLITS[0]
    for split in SPLITS:
        numbers = [*map(int, split.split(","))]
        ends = [numbers[0] / sum(numbers), (numbers[0] + numbers[1]) / sum(numbers)]
        # Megatron rounds each cut to the nearest boundary between documents.
        if all(0 < round(ends[0] * count) < round(ends[1] * count) < count for count in counts):
            return split
    return SPLITS[0]


def find_vocabulary(environment: Mapping[str, str], flags: Sequence[str], is_dry_run: bool) -> list[str]:
    """Return the tokenizer's flags for GPT-2's two files; none if Megatron's `flags` choose a tokenizer.

    Raises:
        RecipeError: a file is missing, and this is no dry run.
    """
    if "--tokenizer-type" in group_by_flag(flags):
        return []
    folder = environment.get("DATA_DIR") or "."
    words = ["--tokenizer-type", "GPT2BPETokenizer"]
    vocabularies, merges = zip(*GPT2_FILES[:2], strict=True)
    for variable, flag, names in (("VOCAB_FILE", "--vocab-file", vocabularies), ("MERGE_FILE", "--merge-file", merges)):
        candidates = [f"{folder}{above}/{name}" for above in ("", "/..") for name in names]
        path = environment.get(variable) or next(filter(os.path.isfile, candidates), candidates[0])
        if not is_dry_run and not os.path.isfile(path):
            raise RecipeError(f"{variable}: there is no {path} (GPT-2's {' or '.join(names)})")
        words += [flag, path]
    return words
