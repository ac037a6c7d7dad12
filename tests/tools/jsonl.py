"""Write lines of text in the formats that tools/preprocess_data.py reads."""

import gzip
from pathlib import Path

from tests.gpt2_reference import gpt2_files
from tests.training_runs import REPOSITORY
from tools.text.preprocessing.reading import zstd

TOOL = REPOSITORY / "tools" / "preprocess_data.py"
GPT2 = "--tokenizer-type GPT2BPETokenizer --vocab-file {} --merge-file {}".format(*gpt2_files())
STRANGE = [
    *("<|endoftext|>", "before<|endoftext|>after <|endoftext|>", "", " ", "\n\n\n   \t x", "nul \x00 \x1f bell"),
    *("naïve “quotes” — 漢字 한국어", "\U0001f469\u200d\U0001f467 \U0001f1ea\U0001f1fa", "it's IT'S we'll 12345 ½²"),
    *("young letters \ua7ce's \u088f's and numbers \U00010d40'll", "line\r\nends\rhere\u2028there\x85"),
    *("x" * 3000, "\ufeffmark", "mixed ascii then \U0001fae9 \U00033479"),
]


def write_lines(path: Path, lines: list[str], end: str = "\n") -> Path:
    data = ("\n".join(lines) + end).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data[:5000]) + gzip.compress(data[5000:])
    elif path.suffix == ".zst":
        skipped = b"\x50\x2a\x4d\x18\x02\x00\x00\x00ab"
        data = skipped + zstd.compress(data[:5000]) + zstd.compress(data[5000:])
    path.write_bytes(data)
    return path


GOOD = '{"text": "good"}'
