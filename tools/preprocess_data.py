"""Turn .jsonl, .jsonl.gz or .jsonl.zst into a Megatron data set (.bin and .idx).

The files equal those of Megatron-LM's tools/preprocess_data.py, byte for byte, for the same input and flags.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a script, in a clone
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from tools.start import run_command

    sys.exit(run_command("preprocess", sys.argv[1:]))

from megatron.remoe.files.errors import DataError

from .console.display import duration
from .console.flags import number_of_cores, tool_parser, whole_number
from .runs.running import make_main
from .text.preprocessing.encoding import TOKENIZER_TYPES, load_encoder
from .text.preprocessing.pipeline import Job, preprocess


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the flags. Those of Megatron-LM's tool keep their meaning."""
    parser = tool_parser("preprocess", __doc__)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="FILE", help="files to read, or patterns: a JSON object per line")
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help="text fields, a data set each (default: text)")
    add("--tokenizer-type", choices=TOKENIZER_TYPES, required=True, help="the run's --tokenizer-type")
    add("--vocab-file", metavar="FILE", help="GPT2BPETokenizer: encoder.json or vocab.json")
    add("--merge-file", metavar="FILE", help="GPT2BPETokenizer: vocab.bpe or merges.txt")
    add("--tokenizer-model", metavar="FOLDER", help="HuggingFaceTokenizer: folder of the tokenizer")
    add("--append-eod", action="store_true", help="end each document with the end-of-document token")
    add("--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX_KEY_document.bin and .idx")
    add("--workers", type=whole_number(1), default=number_of_cores(), help="threads, at most 8 (default: one per core)")
    add("--log-interval", type=int, help="ignored, for Megatron-LM compatibility")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> None:
    """Preprocess, with progress on standard error and a summary on standard output."""
    # By default, the library tokenizers starts one thread per core.
    os.environ.setdefault("RAYON_NUM_THREADS", str(args.workers))
    job = Job(args.input, args.output_prefix, list(dict.fromkeys(args.json_keys)), args.append_eod, args.workers)
    encoder = load_encoder(args.tokenizer_type, args.vocab_file, args.merge_file, args.tokenizer_model)
    start = time.monotonic()
    try:
        summary = preprocess(job, encoder)
    except OSError as error:
        raise DataError(
            f"--output-prefix {args.output_prefix}: cannot be written ({error.strerror or error}). "
            "Nothing was left behind. Free some space, or give a different place.",
            "REMOE-E105",
        ) from error
    seconds = max(time.monotonic() - start, 1e-9)
    rates = f"{summary.text_bytes / 1e6 / seconds:.1f} MB/s  {summary.tokens / 1e6 / seconds:.2f}M tokens/s"
    counts = f"{summary.documents:,} documents ({summary.empty:,} empty), {summary.tokens:,} tokens"
    places = ", ".join(str(job.prefix(key)) for key in job.json_keys)
    print(f"{places}: {counts}; {duration(seconds)}, {rates} with {encoder.engine}")


main = make_main("preprocess", parse_arguments, run, "interrupted; nothing was written")
