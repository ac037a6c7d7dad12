"""Test that the launch scripts' commands match a recorded table.

After an intended change of commands, run `python -m tests.scripts.test_launch_commands` to record the table again. To
add a case, add a row with its script, arguments and environment: ["182m_moe", ["8"], {"TP": "2"}, 0, []].
"""

import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.scripts.launching import planned
from tests.training_runs import REPOSITORY

TABLE = Path(__file__).with_name("launch_commands.json")


def make_data(folder: Path) -> None:
    """Make empty data sets and vocabularies in `folder`."""
    shards = [f"{number:02}_text_document" for number in range(30)]
    files = {
        "pile": ["gpt2-vocab.json", "gpt2-merges.txt", *(f"{name}.bin" for name in shards)],
        "prefixed pile": ["encoder.json", "vocab.bpe", "notes_document.bin", *(f"pile_{name}.bin" for name in shards)],
        "part": [f"{name}.bin" for name in shards[:3]],
        "one data": ["it's mine.bin", "a_document.bin", "a_document.idx"],
        ".": ["gpt2-vocab.json", "gpt2-merges.txt"],
    }
    for name, contents in files.items():
        (folder / name).mkdir(exist_ok=True)
        for content in contents:
            (folder / name / content).touch()


def ask(folder: Path, script: str, arguments: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Return the exit code and the command that a script prints in `folder`, with placeholders for paths."""
    result = planned(script, *arguments, folder=folder, **environment)
    assert result.returncode == 0 or result.stdout == "", result.stdout
    printed = result.stdout.replace(sys.executable, "PYTHON").replace(str(REPOSITORY), "REPOSITORY")
    return result.returncode, shlex.join(shlex.split(printed))


def read() -> list[Any]:
    """Return script, arguments, environment, exit code and printed command of each case."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    return [[*case[:4], " --".join(table["pieces"][place] for place in case[4])] for case in table["cases"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("launches")
    make_data(made)
    return made


@pytest.mark.parametrize("case", read(), ids=lambda case: " ".join([case[0], *case[1], *case[2]]))
def test_command_is_as_recorded(case: list[Any], folder: Path) -> None:
    script, arguments, environment, code, printed = case
    assert ask(folder, script, arguments, environment) == (code, printed)


def main() -> None:
    """Run all cases again and write the table: the pieces of all commands, and the pieces of each case."""
    pieces: dict[str, int] = {}
    rows = []
    with tempfile.TemporaryDirectory() as name:
        make_data(Path(name))
        for script, arguments, environment, *_ in read():
            code, printed = ask(Path(name), script, arguments, environment)
            places = [pieces.setdefault(piece, len(pieces)) for piece in printed.split(" --")] if printed else []
            rows.append([script, arguments, environment, code, places])
    lines = [",\n".join(f" {json.dumps(each, ensure_ascii=False)}" for each in part) for part in (pieces, rows)]
    TABLE.write_text('{{"pieces": [\n{}\n], "cases": [\n{}\n]}}\n'.format(*lines), encoding="utf-8")


if __name__ == "__main__":
    main()
