"""Turn the corpus into Megatron data sets of bytes with tools/preprocess_data.py."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..common.places import ROOT
from . import models, stages

TOOL = ROOT / "tools" / "preprocess_data.py"
BYTES_PER_TOKEN = 2  # Megatron stores small vocabularies as 16-bit numbers


def inputs(corpus: dict[str, Any]) -> str:
    """Return a fingerprint of the text and the code that the data sets are made from."""
    sources = [TOOL, Path(__file__), *TOOL.with_name("preprocessing").glob("*.py")]
    sources += (ROOT / "megatron" / "remoe" / "data").glob("*.py")
    return stages.fingerprint(corpus["inputs"], corpus["domains"], stages.fingerprint_of_files(sources))


def build(folder: Path, corpus_folder: Path, corpus: dict[str, Any], threads: int) -> dict[str, Any]:
    """Write {folder}/{train,heldout}_{domain}_text_document.bin and .idx, or reuse them.

    Args:
        folder: for the data sets and their vocabulary.
        corpus_folder: the corpus.
        corpus: its manifest.
        threads: number of files to process at once.

    Returns:
        The manifest: "inputs", "tokens" (part → domain → number of tokens), "reused".

    Raises:
        stages.QuickstartError: the tool failed, or the number of tokens is not that of the text's bytes.
    """
    stamp = stages.read_stamp(folder / "manifest.json", inputs(corpus))
    if stamp is not None:
        return stamp | {"reused": True}
    from megatron.remoe.data.gpt2_files import byte_level_vocabulary

    stages.fresh_folder(folder)
    byte_level_vocabulary(folder)
    jobs = [(part, domain) for part in ("train", "heldout") for domain in corpus["domains"]]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda job: _preprocess(folder, corpus_folder, *job), jobs))
    manifest: dict[str, Any] = {"inputs": inputs(corpus), "tokens": {"train": {}, "heldout": {}}, "reused": False}
    for part, domain in jobs:
        path = Path(models.data_prefix(folder, part, domain) + ".bin")
        expected = sum(corpus["domains"][domain][part].values())  # a token for each byte and for each end of a document
        tokens = path.stat().st_size // BYTES_PER_TOKEN
        if tokens != expected:
            raise stages.QuickstartError(f"{path} holds {tokens} tokens instead of the {expected} of the text.")
        manifest["tokens"][part][domain] = tokens
    stages.write_json(folder / "manifest.json", manifest)
    return manifest


def _preprocess(folder: Path, corpus_folder: Path, part: str, domain: str) -> None:
    log = folder / f"{part}_{domain}.log"
    text = corpus_folder / part / f"{domain}.jsonl"
    command = [sys.executable, str(TOOL), "--input", str(text), "--json-keys", "text"]
    command += ["--output-prefix", models.data_prefix(folder, part, domain).removesuffix("_text_document")]
    command += ["--tokenizer-type", "GPT2BPETokenizer", "--append-eod", "--workers", "1"]
    command += ["--vocab-file", str(folder / "vocab.json"), "--merge-file", str(folder / "merges.txt")]
    with log.open("w", encoding="utf-8") as output:
        code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT).returncode
    if code:
        end = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-10:])
        raise stages.QuickstartError(
            f"Preprocessing {domain} ended with exit code {code}:\n\n{end}\n\nThe whole log: {log}"
        )


def predicted_tokens(tokens: int, sequence: int) -> int:
    """Return how many tokens an evaluation of a data set predicts: whole sequences, each with the token after it."""
    return (tokens - 1) // sequence * sequence
