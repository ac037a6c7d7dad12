"""Test that Megatron-FSDP saves and resumes; tests/parity tests that it trains like one process."""

import shutil
from pathlib import Path

import pytest
import torch

from megatron.remoe.start.checkpoint_index import read_index
from tests.checkpoints import Saved, training
from tests.parity.layouts import FSDP
from tests.tiny_model import RELU
from tests.training_runs import REPOSITORY, TINY, logged, records, run, series, weights
from tools.console.errors import ConversionError
from tools.models.checkpoints import find, read_tensors

EP2 = "--expert-model-parallel-size 2"
DENSE_TOO = "--moe-layer-freq ([0,1]) --moe-shared-expert-intermediate-size 64"


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Train on two ranks with half of the experts each; return the checkpoints of iterations 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run(words(data, folder), processes=2)
    return Saved(folder)


def words(data: Path, folder: Path, *more: str, split: str = EP2) -> list[str]:
    return training(data, folder, *FSDP.split(), *split.split(), *more)


def goes_on_from_4(saved: Saved) -> Saved:
    """Remove the checkpoint of iteration 6, so that the next run resumes from 4."""
    shutil.rmtree(saved[6])
    return saved


def assert_same_training(actual: Saved, expected: Saved) -> None:
    """Assert that λ's exponents, weights, optimizer states and the last step's figures are equal bit for bit."""
    expected.assert_same_weights(actual, 6)
    assert last_step(actual) == last_step(expected)


def last_step(saved: Saved) -> tuple[float, float, float]:
    """Return λ, S and the gradient norm of the newest step."""
    line = logged(saved.root, "log")[-1]
    return line["l1_coefficient"], line["sparsity"], line["grad_norm"]


def test_a_resumed_training_ends_the_same(saved: Saved, data: Path, uninterrupted: Saved) -> None:
    keys, router = read_index(saved[6]).state_dict_metadata, "model.module.decoder.layers.1.mlp.router."
    assert f"{router}l1_exponent" in keys and f"{router}weight" not in keys, "programs with top-k look for the latter"
    experts = {key for key in keys if key.startswith("model.module.decoder.layers.1.mlp.experts.linear_fc2.weight")}
    assert {key.rsplit("weight", 1)[1] for key in experts} == set("01234567"), "of both ranks"
    output = run(words(data, goes_on_from_4(saved).root), processes=2)
    assert list(records(output)) == [5, 6]
    assert_same_training(saved, uninterrupted)


def test_sharded_gradients_with_dense_layers_and_shared_experts(data: Path, tmp_path: Path) -> None:
    whole, cut = Saved(tmp_path / "whole"), Saved(tmp_path / "cut")
    flags = ["--data-parallel-sharding-strategy", "optim_grads", "--bf16", *DENSE_TOO.split()]
    run(words(data, whole.root, *flags), processes=2)
    whole.copy(cut.root)
    run(words(data, goes_on_from_4(cut).root, *flags), processes=2)
    assert_same_training(cut, whole)


def test_one_process_goes_on(saved: Saved, data: Path, uninterrupted: Saved) -> None:
    output = run(words(data, goes_on_from_4(saved).root, split=""))
    assert list(records(output)) == [5, 6]
    assert last_step(saved)[0] == last_step(uninterrupted)[0]
    assert last_step(saved) == pytest.approx(last_step(uninterrupted), rel=1e-3)


def test_formats_do_not_mix(saved: Saved, data: Path) -> None:
    output = run(training(data, saved.root), expect=2)
    assert "REMOE-E413" in output and "--use-megatron-fsdp (on) in the checkpoint, False here" in output


def test_tools_read_what_is_converted(saved: Saved, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="--from-fsdp"):
        find(saved.root, None)
    words = ["convert", "--from-fsdp", "--load", str(saved.root), "--save", str(tmp_path / "out")]
    run(words, script=REPOSITORY / "tools" / "__main__.py")
    index = read_index(tmp_path / "out" / "release")
    entries = {key: entry for key, entry in index.state_dict_metadata.items() if hasattr(entry, "size")}
    actual = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in entries.items()}
    written = find(tmp_path / "out", None)
    read_tensors(written.folder, written.index, actual)
    stored, layer = weights(saved.root, 6), "model.module.decoder.layers.1."
    experts = "decoder.layers.mlp.experts.experts.linear_fc"
    for number in range(8):
        first = [stored[f"{layer}mlp.experts.linear_fc1.weight{number}_{half}"] for half in "wv"]
        assert torch.equal(actual[f"{experts}1.weight"][1, number], torch.cat(first))
        second = stored[f"{layer}mlp.experts.linear_fc2.weight{number}"]
        assert torch.equal(actual[f"{experts}2.weight"][1, number], second)
    for name in ("mlp.router.relu_weight", "mlp.router.l1_exponent"):
        assert torch.equal(actual[f"decoder.layers.{name}"][1], stored[f"{layer}{name}"])
    assert "decoder.layers.pre_mlp_layernorm.weight" in entries, "Transformer Engine's MoE layers look for it"
    changed = ["--pretrained-checkpoint", str(tmp_path / "out"), "--moe-relu-l1-reg-coeff-init", "1e-2"]
    assert "REMOE-E413" in run(training(data, tmp_path / "new", *changed), expect=2), "λ would jump"


def test_steps_that_are_not_finite_leave_the_coefficient(data: Path) -> None:
    """λ stays, as without Megatron-FSDP, although each rank sees only its own rows of the gradients."""
    broken = "--lr 1e30 --min-lr 1e30 --no-check-for-nan-in-loss-and-grad".split()
    output = run([*TINY, *RELU, *broken, *FSDP.split(), "--data-path", str(data)], processes=2)
    assert series(output, "l1 coefficient") == [1e-8] + [1.2e-8] * 7
    assert "guarded layers" not in output
