"""Turn .jsonl, .jsonl.gz or .jsonl.zst into a Megatron data set (.bin and .idx).

The files equal those of Megatron-LM's tools/preprocess_data.py, byte for byte, for the same input and flags.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
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
from .text.preprocessing.pipeline import Job, Progress, preprocess

PROBLEMS_SHOWN = 5
SECONDS_TO_FIRST_LINE = 10.0
SHARE_BETWEEN_LINES = 0.1  # between two lines of progress, as a share of the time so far


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the flags. Those of Megatron-LM's tool keep their meaning."""
    parser = tool_parser("preprocess", __doc__)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="FILE", help="files to read, or patterns")
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help="text fields, a data set each (default: text)")
    add("--on-error", choices=("stop", "skip"), default="stop", help="stop at or skip unreadable lines (default: stop)")
    add("--tokenizer-type", choices=TOKENIZER_TYPES, required=True, help="the run's --tokenizer-type")
    add("--vocab-file", metavar="FILE", help="GPT2BPETokenizer: encoder.json or vocab.json")
    add("--merge-file", metavar="FILE", help="GPT2BPETokenizer: vocab.bpe or merges.txt")
    add("--tokenizer-model", metavar="FOLDER", help="HuggingFaceTokenizer: folder of the tokenizer")
    add("--append-eod", action="store_true", help="end each document with the end-of-document token")
    add("--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX_KEY_document.bin and .idx")
    add("--overwrite", action="store_true", help="replace existing outputs")
    add("--workers", type=whole_number(1), default=number_of_cores(), help="threads, at most 8 (default: one per core)")
    add("--log-interval", type=int, help="ignored, for Megatron-LM compatibility")
    return parser.parse_args(arguments)


def show_progress(start: float) -> Callable[[Progress], None]:
    """Return a function that prints the first left-out lines, and the progress at growing intervals."""
    next_line, unshown = SECONDS_TO_FIRST_LINE, PROBLEMS_SHOWN

    def show(state: Progress) -> None:
        nonlocal next_line, unshown
        for message in state.messages[:unshown]:
            unshown -= 1
            print(f"left out: {message}", file=sys.stderr, flush=True)
        seconds = time.monotonic() - start
        if seconds > next_line:
            next_line = seconds + max(SECONDS_TO_FIRST_LINE, SHARE_BETWEEN_LINES * seconds)
            share = state.done_bytes / state.total_bytes
            done, left = f"{share:.0%}, {state.documents:,} documents", duration(seconds * (1 - share) / share)
            print(f"{done}  {format_rates(state, seconds)}  {left} left", file=sys.stderr, flush=True)

    return show


def format_rates(state: Progress, seconds: float) -> str:
    """Format the rates: megabytes of text per second, and millions of tokens per second."""
    seconds = max(seconds, 1e-9)
    return f"{state.text_bytes / 1e6 / seconds:.1f} MB/s  {state.tokens / 1e6 / seconds:.2f}M tokens/s"


def run(args: argparse.Namespace) -> None:
    """Preprocess, with progress on standard error and a summary on standard output."""
    # By default, the library tokenizers starts one thread per core.
    os.environ.setdefault("RAYON_NUM_THREADS", str(args.workers))
    skip_bad = args.on_error == "skip"
    keys = list(dict.fromkeys(args.json_keys))
    job = Job(args.input, args.output_prefix, keys, args.append_eod, args.workers, skip_bad, args.overwrite)
    encoder = load_encoder(args.tokenizer_type, args.vocab_file, args.merge_file, args.tokenizer_model)
    start = time.monotonic()
    try:
        state = preprocess(job, encoder, show_progress(start))
    except OSError as error:
        raise DataError(
            f"--output-prefix {args.output_prefix}: cannot be written ({error.strerror or error}). "
            "Nothing was left behind. Free some space, or give a different place.",
            "REMOE-E105",
        ) from error
    seconds = time.monotonic() - start
    empty = f" ({state.empty:,} empty)" if state.empty else ""
    notes = [f"{state.documents:,} documents{empty}, {state.tokens:,} tokens"]
    if state.left_out:
        notes.append(f"left out {state.left_out:,} line{'s' * (state.left_out > 1)}")
    notes.append(f"{duration(seconds)}, {format_rates(state, seconds)} with {encoder.engine}")
    print(f"{', '.join(str(job.prefix(key)) for key in job.json_keys)}: {'; '.join(notes)}")


main = make_main("preprocess", parse_arguments, run, "interrupted; nothing was written")
