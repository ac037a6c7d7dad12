"""Show what a Megatron data set (.bin and .idx) holds, and check that it is whole.

Exit code 1, with the reason, if the pair is truncated or corrupt.
"""

import argparse
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.remoe.data.errors import DataError  # noqa: E402
from megatron.remoe.data.indexed import IndexedReader, bin_path, idx_path  # noqa: E402
from tools.preprocessing.encoders import load_encoder  # noqa: E402
from tools.preprocessing.encoding import TextEncoder  # noqa: E402

BAR_WIDTH = 40


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", metavar="PREFIX", help="the data set's path without .bin or .idx")
    parser.add_argument("--vocab-file", metavar="FILE", help="GPT-2's encoder.json or vocab.json, to decode documents")
    parser.add_argument("--merge-file", metavar="FILE", help="GPT-2's vocab.bpe or merges.txt")
    parser.add_argument("--tokenizer-model", metavar="FOLDER", help="or the folder of a Hugging Face tokenizer")
    parser.add_argument("--documents", type=int, default=3, metavar="N", help="how many documents to show (default: 3)")
    parser.add_argument(
        "--characters", type=int, default=300, metavar="N", help="how much of each to show (default: 300)"
    )
    args = parser.parse_args(arguments)
    for flag, value in (("--documents", args.documents), ("--characters", args.characters)):
        if value < 0:
            parser.error(f"{flag} {value}: must not be negative.")
    return args


def inspect(args: argparse.Namespace) -> Iterator[str]:
    """The lines to print.

    Raises:
        DataError: the data set is not whole, or does not fit the vocabulary.
    """
    prefix = Path(args.prefix)
    if prefix.suffix in (".bin", ".idx"):
        prefix = prefix.with_suffix("")
    data = IndexedReader(prefix)
    lengths = data.document_lengths()
    encoder = _encoder(args)
    if encoder is not None and (largest := data.largest_token()) >= encoder.vocabulary_size:
        raise DataError(
            f"{bin_path(prefix)}: holds token {largest}, and the vocabulary has only {encoder.vocabulary_size}. "
            "Give the vocabulary that the data set was made with."
        )
    size = bin_path(prefix).stat().st_size + idx_path(prefix).stat().st_size
    filled = np.flatnonzero(lengths)
    yield f"{prefix}: whole; {size / 1e6:,.1f} MB, tokens of type {data.dtype}"
    yield f"{data.documents:,} documents ({data.documents - len(filled):,} empty), {data.tokens:,} tokens"
    if not len(filled):
        return
    middle, long, longest = np.percentile(lengths, (50, 90, 100))
    yield (
        f"tokens per document: mean {lengths.mean():,.1f}, median {middle:,.0f}, 90 % up to {long:,.0f}, "
        f"longest {longest:,.0f}"
    )
    yield from histogram(lengths)
    for position in sorted({int(i) for i in np.linspace(0, len(filled) - 1, args.documents)}):
        index = int(filled[position])
        yield f"\ndocument {index:,} ({int(lengths[index]):,} tokens):"
        yield _shown(data.document(index), encoder, args.characters)


def histogram(lengths: npt.NDArray[np.integer]) -> Iterator[str]:
    """Bars of how many documents have 0, 1, 2-3, 4-7, ... tokens; `lengths` has the shape [documents]."""
    classes = np.ceil(np.log2(lengths.astype(np.float64) + 1)).astype(np.int64)
    counts = np.bincount(classes)
    for number in range(int(classes.min()), len(counts)):
        first, last = (1 << number) // 2, (1 << number) - 1
        span = f"{first:,}" if first == last or not number else f"{first:,}-{last:,}"
        yield f"{span:>24} {counts[number]:>12,} {'█' * round(BAR_WIDTH * counts[number] / counts.max())}".rstrip()


def _encoder(args: argparse.Namespace) -> TextEncoder | None:
    if args.tokenizer_model:
        return load_encoder("HuggingFaceTokenizer", args.vocab_file, args.merge_file, args.tokenizer_model)
    if args.vocab_file or args.merge_file:
        return load_encoder("GPT2BPETokenizer", args.vocab_file, args.merge_file)
    return None


def _shown(ids: npt.NDArray[np.integer], encoder: TextEncoder | None, characters: int) -> str:
    if encoder is None:
        numbers = " ".join(map(str, ids[:characters].tolist()))
        return f"{textwrap.shorten(numbers, characters, placeholder=' …')}  (no vocabulary given to decode them)"
    # A token has at least one byte, and a character at most four.
    text = encoder.decode(ids[: 4 * characters + 4])
    return text[:characters] + (" …" if len(text) > characters else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 1 if the data set is not whole or a flag is wrong."""
    args = parse_arguments(arguments)
    try:
        for line in inspect(args):
            print(line, flush=True)
    except BrokenPipeError:
        # Whoever reads has seen enough, as in: inspect_data.py ... | head. Nothing is left to flush at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except DataError as error:
        print(f"inspect_data.py: error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"inspect_data.py: error: {error.filename}: cannot be read ({error.strerror}).", file=sys.stderr)
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
