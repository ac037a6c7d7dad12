"""Test remoe analyze against an independent recount of the routing."""

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from tools.models.expert_counts import expert_blocks

from megatron.remoe.files.indexed import IndexedReader
from megatron.remoe.hf import RemoeForCausalLM
from tests.data_sets import write_documents
from tests.hf.models import args_of, make
from tools.models.analyze.command import main
from tools.models.analyze.counts import WINDOW
from tools.models.checkpoints import save
from tools.models.hf.weights import fill_megatron
from tools.models.megatron_model import build
from tools.models.text import Text

pytestmark = [pytest.mark.usefixtures("process_groups"), pytest.mark.filterwarnings("ignore")]

LENGTH = 20
NAMES = "experts_per_token", "load", "balance", "neighbours", "gates", "losses"


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
    assert all((output / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in NAMES)
    return {name: json.loads((output / f"{name}.json").read_text()) for name in NAMES}


def exported(folder: Path, name: str, **changes: Any) -> tuple[RemoeForCausalLM, Path]:
    model = make(name, vocab_size=257, **changes)
    model.save_pretrained(folder)
    return model, folder


@torch.no_grad()
def recount(model: RemoeForCausalLM, prefix: Path) -> list[list[list[dict[int, float]]]]:
    """Return layer → sequence → token → expert → gate, from the logits of a forward pass."""
    reader, config = IndexedReader(prefix), model.config
    number = reader.tokens // LENGTH
    ids = torch.from_numpy(reader.read(0, number * LENGTH).astype(numpy.int64)).view(number, LENGTH)
    found = []
    for logits in model(ids, output_router_logits=True).router_logits:
        sequences = []
        for rows in logits.view(number, LENGTH, -1).double().tolist():
            if config.moe_relu_routing:
                tokens = [{expert: gate for expert, gate in enumerate(row) if gate > 0} for row in rows]
            else:
                tokens = [topk(row, config.num_experts_per_tok, config.norm_topk_prob) for row in rows]
            sequences.append(tokens)
        found.append(sequences)
    return found


def topk(logits: list[float], k: int, normed: bool) -> dict[int, float]:
    total = sum(map(math.exp, logits))
    first = sorted(range(len(logits)), key=lambda expert: -logits[expert])[:k]
    gates = {expert: math.exp(logits[expert]) / total for expert in first}
    return {expert: gate / sum(gates.values()) for expert, gate in gates.items()} if normed else gates


def test_one_expert_per_token_is_all_of_the_output(domains: list[Path], tmp_path: Path) -> None:
    """The gated output of shared experts is not part of it."""
    _, folder = exported(tmp_path / "model", "top-k", shared_expert_intermediate_size=12, shared_expert_gate=True)
    layers = analyze(tmp_path / "out", "--load", folder, "--data", *domains)["gates"]["layers"]
    assert [of["largest_output"] for of in layers.values()] == pytest.approx([1, 1], rel=1e-5)


def test_a_model_without_an_active_gate(domains: list[Path], tmp_path: Path) -> None:
    model, folder = exported(tmp_path / "model", "relu")
    with torch.no_grad():
        for experts in expert_blocks(model).values():
            experts.gate.weight.zero_()
    model.save_pretrained(folder)
    assert analyze(tmp_path / "out", "--load", folder, "--data", *domains)["gates"]["layers"] == {"1": None, "2": None}


@pytest.mark.parametrize("name", ["relu, shared", "top-k, normed"])
def test_recounted(name: str, domains: list[Path], tmp_path: Path) -> None:
    model, folder = exported(tmp_path / "model", name)
    found = analyze(tmp_path / "out", "--load", folder, "--data", *domains, "--expert-parallel", 4)
    recounted = [recount(model, prefix) for prefix in domains]
    numbers = [*expert_blocks(model)]
    assert ("slopes" in found["experts_per_token"]["by_frequency"]) == model.config.moe_relu_routing
    assert numbers == ([2] if "shared" in name else [1, 2])
    for place, layer in enumerate(map(str, numbers)):
        sequences = [tokens for domain in recounted for tokens in domain[place]]
        tokens = [token for sequence in sequences for token in sequence]
        sizes = [len(token) for token in tokens]
        experts = found["experts_per_token"]["layers"][layer]
        assert experts["histogram"] == pytest.approx([sizes.count(n) / len(sizes) for n in range(9)])
        assert (experts["largest"], experts["none"]) == (max(sizes), sizes.count(0) / len(sizes))

        shares = []
        for domain, prefix in zip(recounted, domains, strict=True):
            inside = [token for sequence in domain[place] for token in sequence]
            shares.append([sum(expert in token for token in inside) / len(inside) for expert in range(8)])
            here = found["load"]["domains"][prefix.name]
            assert here["load"][layer] == pytest.approx(shares[-1])
            assert here["experts_per_token"][layer] == pytest.approx(sum(shares[-1]))
        special = found["load"]["specialization"][layer]
        assert special["bits"] == pytest.approx(bits(shares), abs=1e-12)
        assert special["bits"] > special["shuffled_95"] > special["shuffled"] > 0

        counts = [sum(expert in token for token in tokens) for expert in range(8)]
        balance = found["balance"]["layers"][layer]
        assert balance["sparsity"] == pytest.approx(1 - sum(counts) / len(tokens) / 8)
        assert balance["imbalance"] == pytest.approx(8 * max(counts) / sum(counts))
        assert balance["dead"] == [expert for expert in range(8) if not counts[expert]]
        pairs = [counts[2 * rank] + counts[2 * rank + 1] for rank in range(4)]
        assert balance["rank_imbalance"] == pytest.approx(4 * max(pairs) / sum(counts))

        near = found["neighbours"]["layers"][layer]
        both = [len(before.keys() & token.keys()) for one in sequences for before, token in itertools.pairwise(one)]
        assert near["common"] == pytest.approx(sum(both) / sum(len(token) for one in sequences for token in one[1:]))
        windows = [one[start : start + WINDOW] for one in sequences for start in range(0, LENGTH - WINDOW + 1, WINDOW)]
        unions = [len(set().union(*window)) for window in windows]
        assert near["union"] == pytest.approx(sum(unions) / len(unions))

        gates = [gate for token in tokens for gate in token.values()]
        size = found["gates"]["layers"][layer]
        assert size["mean"] == pytest.approx(sum(gates) / len(gates), rel=1e-5)
        assert size["median"] == pytest.approx(numpy.median(gates), rel=0.05)
        largest = [max(token.values()) / sum(token.values()) for token in tokens if token]
        assert size["largest_gate"] == pytest.approx(sum(largest) / len(largest), rel=1e-5)
        assert size["largest_output"] == pytest.approx(largest_in_output(model, int(layer), domains), rel=1e-4)


@torch.no_grad()
def test_losses_by_the_number_of_experts(domains: list[Path], tmp_path: Path) -> None:
    """Losses and correlations match a recount by token. Top-k has no correlation: all tokens have the same number."""
    model, folder = exported(tmp_path / "model", "relu")
    found = analyze(tmp_path / "out", "--load", folder, "--data", *domains)["losses"]
    rows = []
    for prefix in domains:
        layers = recount(model, prefix)
        ids = torch.from_numpy(IndexedReader(prefix).read(0, len(layers[0]) * LENGTH).astype(numpy.int64))
        for place, sequence in enumerate(ids.view(-1, LENGTH)):
            rated = -model(sequence[None]).logits[0].log_softmax(dim=-1)
            loss = [0.0, *(float(rated[token - 1, sequence[token]]) for token in range(1, LENGTH))]
            for token in range(1, LENGTH - 1):
                rows.append([*(len(layer[place][token]) for layer in layers), loss[token], loss[token + 1]])
    counted = numpy.array(rows)
    numbers = numpy.column_stack([counted[:, :-2], counted[:, :-2].sum(axis=1)])
    for number, (layer, of) in zip(numbers.T, found["correlation"].items(), strict=True):
        for loss, key in zip(counted[:, -2:].T, ("own", "next"), strict=True):
            assert of[key] == pytest.approx(numpy.corrcoef(number, loss)[0, 1], rel=1e-4), layer
    for row in found["experts"]:
        these = counted[numbers[:, -1] == row["experts"], -2:]
        assert row["tokens"] == len(these)
        assert [row["own"], row["next"]] == pytest.approx(these.mean(axis=0), rel=1e-5)
    _, folder = exported(tmp_path / "top-k", "top-k, normed")
    alike = analyze(tmp_path / "out", "--load", folder, "--data", *domains)["losses"]["correlation"]
    assert all(of == {"own": None, "next": None} for of in alike.values())


def bits(shares: list[list[float]]) -> float:
    """Return the mutual information of domain and expert as H(domain) + H(expert) - H(both)."""
    both = numpy.array([[share / sum(row) / len(shares) for share in row] for row in shares])

    def entropy(shares: numpy.ndarray) -> float:
        return -sum(share * math.log2(share) for share in shares.flatten() if share)

    return entropy(both.sum(axis=0)) + entropy(both.sum(axis=1)) - entropy(both)


@torch.no_grad()
def largest_in_output(model: RemoeForCausalLM, layer: int, domains: list[Path]) -> float:
    """Return the largest gate's mean share of the output, with each expert of each token computed separately."""
    block, found = expert_blocks(model)[layer], []

    def look(_: object, given: tuple[torch.Tensor, ...]) -> None:
        for token in given[0].flatten(0, 1):
            _, gates, experts = (one[0] for one in block.gate(token[None]))
            parts = []
            for expert, weight in zip(experts[gates > 0], gates[gates > 0], strict=True):
                gate, up = (block.experts.gate_up_proj[expert] @ token).chunk(2)
                parts.append(weight * (block.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)))
            if parts:
                largest = parts[int(gates[gates > 0].argmax())]
                size, rest = float(largest.norm()), float((sum(parts) - largest).norm())
                found.append(size / (size + rest))

    handle = block.register_forward_pre_hook(look)
    for prefix in domains:
        text = Text(str(prefix), LENGTH, 1, 257)
        model(text.read(0, len(text)))
    handle.remove()
    return sum(found) / len(found)


def test_frequent_tokens_and_those_of_an_expert(domains: list[Path], tmp_path: Path) -> None:
    """Frequencies and shares of tokens match a recount. A single data set has no specialization."""
    model, folder = exported(tmp_path / "model", "relu")
    found = analyze(tmp_path / "out", "--load", folder, "--data-path", domains[0])
    assert found["load"]["specialization"] is None
    ids = Text(str(domains[0]), LENGTH, 1, 257).read(0, 10**6).flatten().tolist()
    assert sorted(ids) == sorted(IndexedReader(domains[0]).read(0, len(ids)).tolist())
    ids = IndexedReader(domains[0]).read(0, len(ids)).tolist()
    layers = [[token for sequence in layer for token in sequence] for layer in recount(model, domains[0])]
    for one in found["experts_per_token"]["by_frequency"]["tokens"]:
        taken = [len(token) for layer in layers for name, token in zip(ids, layer, strict=True) if name == one["token"]]
        assert one["frequency"] == ids.count(one["token"]) / len(ids)
        assert one["experts"] == pytest.approx(sum(taken) / len(taken))
    for layer, experts in found["load"]["tokens"].items():
        for expert, rows in enumerate(experts):
            assert [row["share"] for row in rows] == sorted((row["share"] for row in rows), reverse=True)
            for row in rows:
                routed = [name for name, token in zip(ids, layers[int(layer) - 1], strict=True) if expert in token]
                assert row["share"] == routed.count(row["token"]) / row["occurrences"]


def test_reads_checkpoints(domains: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A run's checkpoint has the results of the exported folder, also without a tokenizer. Wrong flags are refused."""
    model, folder = exported(tmp_path / "model", "relu")
    args = args_of(model.config)
    args.tokenizer_type, args.params_dtype = "SentencePieceTokenizer", torch.float32
    megatron = build(args)
    fill_megatron(megatron, model, model.config)
    run = tmp_path / "run"
    run.mkdir()
    save(megatron, args, run / "checkpoints")
    expected = analyze(tmp_path / "out", "--load", folder, "--data", *domains)
    words = ["--load", str(run), "--seq-length", str(LENGTH), "--data", *map(str, domains)]
    assert main(words) == 0 and "SentencePieceTokenizer" in capfd.readouterr().err
    for name in NAMES:
        close(json.loads((run / "analysis" / f"{name}.json").read_text()), expected[name])
    for wrong, code in (
        (["--tokenizer-model", "/nowhere"], "E513"),
        (["--expert-parallel", "3"], "E501"),
        (["--seq-length", "99999"], "E501"),
        (["--load", str(exported(tmp_path / "dense", "dense")[1])], "E501"),
        (["--load", str(tmp_path / "small"), "--output-dir", str(tmp_path / "new")], "E305"),
    ):
        if "small" in wrong[1]:
            make("relu").save_pretrained(wrong[1])
        assert main([*words, *wrong]) == 1
        assert f"[REMOE-{code}]" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        main([*words, str(domains[0].parent / "." / domains[0].name)])
    assert f"--data-path {domains[0]}" in capfd.readouterr().err


def close(found: Any, expected: Any) -> None:
    """Assert that two values are the same up to rounding."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            close(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            close(one, other)
    else:
        assert found == (pytest.approx(expected, rel=1e-6) if isinstance(expected, float) else expected)
