"""Turn .jsonl, .jsonl.gz or .jsonl.zst into a Megatron data set (.bin and .idx).

Writes, byte for byte, what Megatron-LM's own tools/preprocess_data.py writes for the same input and flags.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from megatron.remoe.data.console import PreprocessingDisplay
from megatron.remoe.data.encoders import TOKENIZER_TYPES, load_encoder
from megatron.remoe.data.errors import DataError
from megatron.remoe.data.preprocessing import Job, check_outputs, preprocess
from megatron.remoe.data.reading import expand_inputs


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags; those that Megatron-LM's tool has too mean the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("input")
    data.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="files, or patterns such as 'pile/*.jsonl.zst', or - for standard input",
    )
    data.add_argument(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="fields of each line that hold text; each gives a data set of its own (default: text)",
    )
    data.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="stop at a line that cannot be read, or leave it out and count it (default: stop)",
    )
    tokens = parser.add_argument_group("tokenizer")
    tokens.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, required=True)
    tokens.add_argument("--vocab-file", metavar="FILE", help="GPT2BPETokenizer: encoder.json or vocab.json")
    tokens.add_argument("--merge-file", metavar="FILE", help="GPT2BPETokenizer: vocab.bpe or merges.txt")
    tokens.add_argument("--tokenizer-model", metavar="FOLDER", help="HuggingFaceTokenizer: folder of the tokenizer")
    tokens.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document token")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX_KEY_document.bin and .idx"
    )
    output.add_argument("--overwrite", action="store_true", help="replace outputs that are there already")
    run = parser.add_argument_group("run")
    run.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads (default: one a core)")
    run.add_argument("--log-interval", type=int, help="taken for Megatron-LM's sake; progress is shown by time")
    args = parser.parse_args(arguments)
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: must be at least 1.")
    return args


def run(args: argparse.Namespace) -> None:
    """Preprocess, with progress on standard error and a summary on standard output."""
    job = Job(
        args.input,
        args.output_prefix,
        args.json_keys,
        args.append_eod,
        args.workers,
        args.on_error == "skip",
        args.overwrite,
    )
    # Before the tokenizer is loaded, which takes a moment.
    expand_inputs(job.inputs)
    check_outputs(job)
    encoder = load_encoder(args.tokenizer_type, args.vocab_file, args.merge_file, args.tokenizer_model, job.threads)
    with PreprocessingDisplay() as display:
        result = preprocess(job, encoder, display.update, display.report)
        summary = display.summary(job, result, encoder)
    print(summary)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 1 after a mistake of the user, 130 after an interruption."""
    args = parse_arguments(arguments)
    # For the library tokenizers, which makes as many threads as there are cores otherwise.
    os.environ.setdefault("RAYON_NUM_THREADS", str(args.workers))
    try:
        run(args)
    except DataError as error:
        print(f"preprocess_data.py: error: {error}", file=sys.stderr)
    except OSError as error:
        print(
            f"preprocess_data.py: error: --output-prefix {args.output_prefix}: cannot be written "
            f"({error.strerror or error}). Nothing was left behind. Free some space, or give another place.",
            file=sys.stderr,
        )
    except KeyboardInterrupt:
        print("preprocess_data.py: interrupted; nothing was written.", file=sys.stderr)
        return 130
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
