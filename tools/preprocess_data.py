"""Turn .jsonl, .jsonl.gz or .jsonl.zst into a Megatron data set (.bin and .idx).

Writes, byte for byte, what Megatron-LM's own tools/preprocess_data.py writes for the same input and flags.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.remoe.data.errors import DataError  # noqa: E402
from tools.common.units import duration  # noqa: E402
from tools.preprocessing.documents import Problem  # noqa: E402
from tools.preprocessing.encoders import TOKENIZER_TYPES, load_encoder  # noqa: E402
from tools.preprocessing.pipeline import Job, Progress, check_outputs, preprocess  # noqa: E402
from tools.preprocessing.reading import expand_inputs  # noqa: E402

PROBLEMS_SHOWN = 5
FIRST_LINE_AFTER = 10.0  # seconds; the waits between plain lines grow with the time that a run takes
SHARE_BETWEEN_LINES = 0.1


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


class Display:
    """Shows on standard error how far a run is: a bar on a terminal, a few plain lines elsewhere."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        columns = BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[note]}")
        self._bar = Bar(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("", total=None, note="starting")
        self._start = time.monotonic()
        self._next_line = FIRST_LINE_AFTER
        self._problems = 0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def update(self, state: Progress) -> None:
        """Some more was done."""
        seconds = time.monotonic() - self._start
        note = f"{state.documents:,} documents  {rates(state, seconds)}{time_left(state, seconds)}"
        self._bar.update(self._task, total=state.total_bytes, completed=state.done_bytes, note=note)
        if not self._console.is_terminal and seconds > self._next_line:
            self._next_line = seconds + max(FIRST_LINE_AFTER, SHARE_BETWEEN_LINES * seconds)
            done = f"{state.done_bytes / state.total_bytes:.0%}, " if state.total_bytes else ""
            self._print(f"{done}{note}")

    def report(self, problem: Problem) -> None:
        """A line was left out; the first few are shown."""
        self._problems += 1
        if self._problems <= PROBLEMS_SHOWN:
            self._print(f"left out: {problem.message}")
        elif self._problems == PROBLEMS_SHOWN + 1:
            self._print("left out: more such lines, which are only counted")

    def summary(self, job: Job, state: Progress, engine: str) -> str:
        """One line for the end of a run."""
        seconds = time.monotonic() - self._start
        outputs = ", ".join(str(job.prefix(key)) for key in job.json_keys)
        empty = f" ({state.empty:,} empty)" if state.empty else ""
        problems = "; ".join(f"{count:,} {kind}" for kind, count in state.problems.most_common())
        left_out = f"; left out {state.problems.total():,} lines ({problems})" if problems else ""
        return (
            f"{outputs}: {state.documents:,} documents{empty}, {state.tokens:,} tokens{left_out}; read back and right; "
            f"{duration(seconds)}, {rates(state, seconds)} with {engine}"
        )

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def rates(state: Progress, seconds: float) -> str:
    """Megabytes of input text and tokens per second."""
    seconds = max(seconds, 1e-9)
    return f"{state.text_bytes / 1e6 / seconds:.1f} MB/s  {state.tokens / 1e6 / seconds:.2f}M tokens/s"


def time_left(state: Progress, seconds: float) -> str:
    """How long the rest will take, if that can be told."""
    if not state.total_bytes or not state.done_bytes:
        return ""
    return f"  {duration(seconds * (state.total_bytes - state.done_bytes) / state.done_bytes)} left"


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
    with Display() as display:
        result = preprocess(job, encoder, display.update, display.report)
    print(display.summary(job, result, encoder.engine))


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
