"""Show the documents of a Megatron data set (.bin and .idx), and check that it is complete.

Exits with 1 and the reason if the pair is truncated or corrupt.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron.remoe.files.errors import DataError
from megatron.remoe.files.indexed import IndexedReader, bin_path, idx_path

from ..console.flags import tool_parser, whole_number
from ..runs.running import make_main
from .preprocessing.encoding import load_encoder

CHARACTERS = 300  # shown of a document


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the flags."""
    parser = tool_parser("inspect", __doc__)
    add = parser.add_argument
    add("prefix", metavar="PREFIX", help="the data set's path without .bin or .idx")
    add("--vocab-file", metavar="FILE", help="GPT-2's encoder.json or vocab.json, to decode documents")
    add("--merge-file", metavar="FILE", help="GPT-2's vocab.bpe or merges.txt")
    add("--tokenizer-model", metavar="FOLDER", help="folder of a Hugging Face tokenizer, instead of both files")
    add("--documents", type=whole_number(0), default=3, metavar="N", help="show N documents (default: 3)")
    return parser.parse_args(arguments)


def inspect(args: argparse.Namespace) -> None:
    """Print the size and some documents of a data set.

    Raises:
        DataError: the data set is not whole, or does not fit the vocabulary.
    """
    prefix = Path(args.prefix.removesuffix(".bin").removesuffix(".idx"))
    data, encoder = IndexedReader(prefix), None
    if args.tokenizer_model or args.vocab_file or args.merge_file:
        kind = "HuggingFaceTokenizer" if args.tokenizer_model else "GPT2BPETokenizer"
        encoder = load_encoder(kind, args.vocab_file, args.merge_file, args.tokenizer_model)
        if (largest := data.largest_token()) >= encoder.vocabulary_size:
            raise DataError(
                f"{bin_path(prefix)}: holds token {largest}, and the vocabulary has only {encoder.vocabulary_size}. "
                "Give the vocabulary that the data set was made with."
            )
    size = bin_path(prefix).stat().st_size + idx_path(prefix).stat().st_size
    lengths = data.document_lengths()
    filled = np.flatnonzero(lengths)
    print(f"{prefix}: whole; {size / 1e6:,.1f} MB, tokens of type {data.dtype}")
    print(f"{data.documents:,} documents ({data.documents - len(filled):,} empty), {data.tokens:,} tokens")
    if not len(filled):
        return
    print(f"tokens per document: mean {lengths.mean():,.1f}, longest {lengths.max():,}")
    for index in sorted({int(filled[int(i)]) for i in np.linspace(0, len(filled) - 1, args.documents)}):
        # A token has at least one byte, and a character at most four.
        ids = data.document(index)[: 4 * CHARACTERS + 4]
        text = encoder.decode(ids) if encoder is not None else " ".join(map(str, ids.tolist()))
        shown = text[:CHARACTERS] + (" …" if len(text) > CHARACTERS else "")
        print(f"\ndocument {index:,} ({int(lengths[index]):,} tokens):\n{shown}")


main = make_main("inspect", parse_arguments, inspect)
