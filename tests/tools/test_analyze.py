"""Test remoe analyze against an independent recount of the routing."""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from transformers import AutoTokenizer

from megatron.remoe.hf import RemoeForCausalLM
from tests.data_sets import write_documents
from tests.hf.models import build_megatron, make
from tests.tiny_model import RELU
from tests.training_runs import TINY, run
from tools.models.analyze import findings
from tools.models.analyze.command import main
from tools.models.checkpoints import save
from tools.models.hf.opening import open_model
from tools.models.measuring import find_blocks
from tools.models.text import read_batches, read_sequences, sample

pytestmark = [pytest.mark.usefixtures("process_groups"), pytest.mark.filterwarnings("ignore")]

LENGTH = 20
NAMES = "experts_per_token", "load", "balance"


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Write two data sets that share no byte, only the token at the end of documents."""
    folder, dice = tmp_path_factory.mktemp("domains"), random.Random(1)
    for name, letters, documents in (("words", b"abcdefgh ", 12), ("numbers", b"0123456789,", 8)):
        texts = [bytes(dice.choices(letters, weights=range(1, len(letters) + 1), k=49)) for _ in range(documents)]
        write_documents(folder / name, texts)
    return [folder / "words", folder / "numbers"]


def analyze(output: Path, *words: object) -> dict[str, Any]:
    assert main([*map(str, words), "--seq-length", str(LENGTH), "--output-dir", str(output)]) == 0
    assert all((output / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in NAMES[:2])
    return {name: json.loads((output / f"{name}.json").read_text()) for name in NAMES}


def exported(folder: Path, name: str, **changes: Any) -> tuple[RemoeForCausalLM, Path]:
    model = make(name, vocab_size=257, **changes)
    model.save_pretrained(folder)
    return model, folder


def read_ids(prefix: Path) -> torch.Tensor:
    """Return the sequences of a data set, int64 `[sequences, LENGTH]`."""
    data = read_sequences(str(prefix), LENGTH, 1234, 257)
    return torch.cat(list(read_batches(data, None, 257)))[:, :-1]


@torch.no_grad()
def recount(model: RemoeForCausalLM, prefix: Path) -> list[list[list[dict[int, float]]]]:
    """Return layer → sequence → token → expert → gate, from the logits of a forward pass."""
    ids, config = read_ids(prefix), model.config
    results = []
    for logits in model(ids, output_router_logits=True).router_logits:
        sequences = []
        for rows in logits.view(len(ids), LENGTH, -1).double().tolist():
            if config.moe_relu_routing:
                tokens = [{expert: gate for expert, gate in enumerate(row) if gate > 0} for row in rows]
            else:
                tokens = [topk(row, config.num_experts_per_tok, config.norm_topk_prob) for row in rows]
            sequences.append(tokens)
        results.append(sequences)
    return results


def topk(logits: list[float], k: int, normed: bool) -> dict[int, float]:
    total = sum(map(math.exp, logits))
    first = sorted(range(len(logits)), key=lambda expert: -logits[expert])[:k]
    gates = {expert: math.exp(logits[expert]) / total for expert in first}
    return {expert: gate / sum(gates.values()) for expert, gate in gates.items()} if normed else gates


@pytest.mark.parametrize("name", ["relu, shared", "top-k, normed"])
def test_recounted(name: str, domains: list[Path], tmp_path: Path) -> None:
    model, folder = exported(tmp_path / "model", name)
    results = analyze(tmp_path / "out", "--load", folder, "--data", *domains)
    recounted = [recount(model, prefix) for prefix in domains]
    numbers = [*find_blocks(model)]
    assert ("slopes" in results["experts_per_token"]["by_frequency"]) == model.config.moe_relu_routing
    assert numbers == ([2] if "shared" in name else [1, 2])
    words = ["--load", folder, "--data", domains[0], "--sequences", "1", "--seed"]
    first, second = (analyze(tmp_path / str(seed), *words, seed)["load"]["domains"]["words"] for seed in (1, 2))
    assert first["tokens"] == second["tokens"] == LENGTH and first["load"] != second["load"]
    for place, layer in enumerate(map(str, numbers)):
        sequences = [tokens for domain in recounted for tokens in domain[place]]
        tokens = [token for sequence in sequences for token in sequence]
        sizes = [len(token) for token in tokens]
        experts = results["experts_per_token"]["layers"][layer]
        assert experts["histogram"] == pytest.approx([sizes.count(n) / len(sizes) for n in range(9)])
        assert experts["percentile_99"] == sorted(sizes)[math.ceil(0.99 * len(sizes)) - 1]
        assert (experts["largest"], experts["none"]) == (max(sizes), sizes.count(0) / len(sizes))

        shares = []
        for domain, prefix in zip(recounted, domains, strict=True):
            inside = [token for sequence in domain[place] for token in sequence]
            shares.append([sum(expert in token for token in inside) / len(inside) for expert in range(8)])
            here = results["load"]["domains"][prefix.name]
            assert here["load"][layer] == pytest.approx(shares[-1])
            assert here["experts_per_token"][layer] == pytest.approx(sum(shares[-1]))
        special = results["load"]["specialization"][layer]
        assert special == pytest.approx(bits(shares), abs=1e-12)

        counts = [sum(expert in token for token in tokens) for expert in range(8)]
        balance = results["balance"]["layers"][layer]
        assert balance["sparsity"] == pytest.approx(1 - sum(counts) / len(tokens) / 8)
        assert balance["imbalance"] == pytest.approx(8 * max(counts) / sum(counts))
        assert balance["dead"] == [expert for expert in range(8) if not counts[expert]]


def bits(shares: list[list[float]]) -> float:
    """Return the mutual information of domain and expert as H(domain) + H(expert) - H(both)."""
    both = numpy.array([[share / sum(row) / len(shares) for share in row] for row in shares])

    def entropy(shares: numpy.ndarray) -> float:
        return -sum(share * math.log2(share) for share in shares.flatten() if share)

    return entropy(both.sum(axis=0)) + entropy(both.sum(axis=1)) - entropy(both)


def test_frequent_tokens_and_those_of_an_expert(domains: list[Path], tokenizer: Path, tmp_path: Path) -> None:
    """Frequencies and shares of tokens match a recount. A single data set has no specialization."""
    model, folder = exported(tmp_path / "model", "relu")
    results = analyze(tmp_path / "out", "--load", folder, "--data-path", domains[0], "--tokenizer-model", tokenizer)
    names = AutoTokenizer.from_pretrained(tokenizer)
    assert results["load"]["specialization"] is None
    layers = [[token for sequence in layer for token in sequence] for layer in recount(model, domains[0])]
    ids = read_ids(domains[0]).flatten().tolist()
    frequency = results["experts_per_token"]["by_frequency"]
    points = numpy.array([(math.log10(one["frequency"]), one["experts"]) for one in frequency["tokens"]])
    assert frequency["slopes"]["mean"] == pytest.approx(numpy.polyfit(*points.T, 1)[0])
    for one in frequency["tokens"]:
        taken = [len(token) for layer in layers for name, token in zip(ids, layer, strict=True) if name == one["token"]]
        assert one["frequency"] == ids.count(one["token"]) / len(ids)
        assert one["experts"] == pytest.approx(sum(taken) / len(taken))
    for layer, experts in results["load"]["tokens"].items():
        for expert, rows in enumerate(experts):
            assert [row["share"] for row in rows] == sorted((row["share"] for row in rows), reverse=True)
            for row in rows:
                routed = [name for name, token in zip(ids, layers[int(layer) - 1], strict=True) if expert in token]
                assert row["text"] == names.convert_ids_to_tokens(row["token"])
                assert row["share"] == routed.count(row["token"]) / row["occurrences"]


def test_reads_checkpoints(domains: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A run's checkpoint gives the exported folder's results, even without a tokenizer. Wrong flags are refused."""
    model, folder = exported(tmp_path / "model", "relu")
    run = tmp_path / "run"
    run.mkdir()
    own = {"tokenizer_type": "SentencePieceTokenizer", "params_dtype": torch.float32}
    save(*build_megatron(model, **own), run / "checkpoints")
    expected = analyze(tmp_path / "out", "--load", folder, "--data", *domains)
    words = ["--load", str(run), "--seq-length", str(LENGTH), "--data", *map(str, domains)]
    assert main(words) == 0 and "SentencePieceTokenizer" in capfd.readouterr().err
    for name in NAMES:
        assert json.loads((run / "analysis" / f"{name}.json").read_text()) == expected[name]
    for wrong, code in (
        (["--tokenizer-model", "/nowhere"], "E513"),
        (["--seq-length", "99999"], "E501"),
        (["--ckpt-step", "7"], "E402"),
        (["--load", str(exported(tmp_path / "dense", "dense")[1])], "E501"),
        (["--load", str(tmp_path / "small"), "--output-dir", str(tmp_path / "new")], "E305"),
    ):
        if "small" in wrong[1]:
            make("relu").save_pretrained(wrong[1])
        assert main([*words, *wrong]) == 1
        assert f"[REMOE-{code}]" in capfd.readouterr().err


def test_flips(data: Path, domains: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Flips between consecutive checkpoints match a recount. A damaged checkpoint is left out."""
    run([*TINY, *RELU, "--data-path", str(data), "--train-iters", "4", "--save", str(tmp_path), "--save-interval", "1"])
    (tmp_path / "iter_0000003" / "metadata.json").unlink()
    words = ["--load", str(tmp_path), "--seq-length", str(LENGTH), "--data", *map(str, domains), "--flips"]
    assert main(words) == 0 and "2 to 4" in capfd.readouterr().out
    pairs = json.loads((tmp_path / "analysis" / "flips.json").read_text())
    assert [(pair["from"], pair["to"]) for pair in pairs] == [(1, 2), (2, 4)]
    chosen = {step: choices(open_model(tmp_path, step, needs_tokenizer=False).model, domains) for step in (1, 2, 4)}
    for pair in pairs:
        assert pair["layers"].keys() == {"1", "2"} and pair["rate"] > 0.01
        layers = zip(pair["layers"].values(), chosen[pair["from"]], chosen[pair["to"]], strict=True)
        for figures, before, after in layers:
            changed = [len(was ^ now) for was, now in zip(before, after, strict=True)]
            count = sum(changed) / len(changed)
            assert figures == pytest.approx(
                {"rate": count / 8, "count": count, "changed_tokens": 1 - changed.count(0) / len(changed)}
            )
        for key in figures:
            assert pair[key] == pytest.approx(sum(layer[key] for layer in pair["layers"].values()) / 2)
    for step in (1, 2):
        (tmp_path / f"iter_000000{step}" / "metadata.json").unlink()
    assert main(words) == 1 and "[REMOE-E404]" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        main([*words, "--ckpt-step", "4"])


def choices(model: RemoeForCausalLM, domains: list[Path]) -> list[list[set[int]]]:
    """Return layer → token → its experts."""
    layers = zip(*(recount(model, prefix) for prefix in domains), strict=True)
    return [[{*token} for domain in layer for sequence in domain for token in sequence] for layer in layers]


def test_information() -> None:
    """Two domains that share no expert have 1 bit, those with equal loads 0. A domain without pairs is ignored."""
    apart, alike, silent = [[8, 0], [0, 2]], [[3, 9], [1, 3]], [[3, 5], [0, 0]]
    routed = torch.tensor([apart, alike, silent]).transpose(0, 1)
    assert findings.information(routed).tolist() == pytest.approx([1, 0, 0])


def test_layers_with_few_pairs_or_none() -> None:
    active, ids = torch.zeros(8, 8, dtype=torch.bool), torch.zeros(8, dtype=torch.int64)
    active[0, 2] = active[1, 2] = active[5, 7] = True
    counts = findings.Counts([1, 2], 1, experts=8, vocabulary=1)
    counts.add(0, ids, 0, active)
    counts.add(0, ids, 1, torch.zeros_like(active))
    balance = findings.balance(counts, topk=1)["layers"]
    assert balance[1]["inactive"] == balance[1]["dead"] == [0, 1, 3, 4, 5, 6]
    assert balance[2]["imbalance"] is None and balance[2]["dead"] == [*range(8)]


def test_samples_do_not_repeat(tmp_path: Path) -> None:
    write_documents(tmp_path / "text", [bytes(range(200))])
    drawn = sample(([str(tmp_path / "text")], None), sequences=20, length=10, vocabulary=257, seed=1)
    assert sorted(drawn[:, 0].tolist()) == [*range(0, 200, 10)]
