"""Test error messages: which ranks print them, the program's name in front, the remedy, and the listed codes."""

import re
import socket
import sys

import pytest
import torch

from megatron.remoe.files.errors import DataError
from megatron.remoe.start import messages
from tests.training_runs import REPOSITORY


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list that collects the seconds that a rank would wait before it prints."""
    seconds: list[float] = []
    monkeypatch.setattr(messages.time, "sleep", seconds.append)
    monkeypatch.setattr(messages.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["/somewhere/own_script.py"])
    return seconds


def said(error: Exception, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop, messages.usage_errors():
        raise error
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_the_first_rank_says_it_at_once(waited, monkeypatch, capsys) -> None:
    monkeypatch.setenv("RANK", "0")
    assert said(ValueError("--lr is wrong"), capsys) == "own_script.py: error: --lr is wrong\n"
    assert said(DataError("no data"), capsys) == f"own_script.py: error: no data [{DataError.code}]\n"
    assert not waited


def test_other_ranks_print_rank_specific_errors(waited, monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert said(ValueError("--lr is wrong"), capsys) == "", "flags are wrong on all ranks, and told once"
    assert "--lr is wrong" in (tmp_path / "error.json").read_text(), "torchrun's report of this node has the reason"
    begins = f"own_script.py: error: rank 3 on {socket.gethostname()}: "
    for local_rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert said(DataError("no data"), capsys) == f"{begins}no data [{DataError.code}]\n"
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert said(AssertionError("no such variable"), capsys) == f"{begins}no such variable\n", "it can be this node only"
    assert 0 < waited[1] < waited[0] == waited[2], "torchrun ends the others when the first of a machine has spoken"


@pytest.mark.parametrize(("text", "remedy", "has_traceback"), [
    ("CUDA out of memory", "--micro-batch-size", True),
    ("DataLoader worker (pid 7) is killed by signal: Terminated. ", "was killed", False),
])  # fmt: skip
def test_last_words_are_of_the_program(text, remedy: str, has_traceback: bool, waited, monkeypatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stop:
        try:
            raise RuntimeError(text)
        except RuntimeError as error:
            messages.exit_with_message(error)
    output = capsys.readouterr().err
    words = output.splitlines()[-2:]
    assert stop.value.code == 1 and ("Traceback" in output) == has_traceback
    assert words[0].startswith(f"own_script.py: error: rank 1: RuntimeError: {text.strip()}") and remedy in words[1]


@pytest.mark.parametrize(("error", "remedy"), [
    (torch.distributed.DistStoreError("Timed out after 61 seconds waiting for clients."), "MASTER_ADDR"),
    (torch.distributed.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed."), "has ended"),
    (torch.distributed.DistBackendError("Watchdog caught collective operation timeout: WorkNCCL("), "hangs"),
    (FileNotFoundError("No such file: '/data/finance/upgrade.bin'"), ""),
    (RuntimeError("the loss is nan"), "--ckpt-step"),
    (KeyError("decoder.q_layernorm.weight from model not in state dict"), "different model"),
    (ConnectionError("HTTPSConnectionPool(host='huggingface.co', port=443): Read timed out."), ""),
])  # fmt: skip
def test_errors_have_the_remedy_of_their_kind(error: Exception, remedy: str) -> None:
    _, *below = messages.describe_error(error).splitlines()
    assert remedy in below[0] if remedy else not below


def test_codes_that_are_raised_are_those_that_are_listed() -> None:
    paths = [path for room in ("megatron/remoe", "tools") for path in (REPOSITORY / room).rglob("*.py")]
    raised = {code for path in paths for code in re.findall(r"REMOE-E\d+", path.read_text())}
    page = (REPOSITORY / "docs" / "errors.md").read_text()
    assert raised == set(re.findall(r"^\| (REMOE-E\d+) \|", page, re.MULTILINE))
