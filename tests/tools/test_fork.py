"""Test checkpoints that the authors' code wrote: conversion, continued training, and use in the tools."""

import argparse
import math
import shutil
import tarfile
from pathlib import Path

import pytest
import torch

from megatron.remoe.start.checkpoint_files import common_state
from megatron.remoe.start.checkpoint_index import read_index
from tests.fork import oracle
from tests.training_runs import REPOSITORY, run, series, step_losses, weights
from tools.models.convert.command import main
from tools.models.convert.from_fork import COEFFICIENT, _exponent
from tools.models.convert.rewriting import read_content, write_content
from tools.models.hf.opening import open_run
from tools.models.measuring import compute_logits

pytestmark = [pytest.mark.usefixtures("process_groups"), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("text") / "data"
    oracle.write_data(prefix)
    return prefix


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpack the fork's checkpoints, one folder per kind."""
    folder = tmp_path_factory.mktemp("saved")
    for kind in oracle.KEPT:
        with tarfile.open(REPOSITORY / "tests" / "fork" / f"{kind}.tar.xz") as archive:
            archive.extractall(folder / kind, filter="data")
    return folder


def convert(*arguments: object) -> int:
    return main(["--from-fork", *map(str, arguments)])


def continued(kind: str, text: Path, load: Path, save: Path, *more: str, expect: int = 0) -> str:
    """Continue training with the fork's flags, but without Transformer Engine and in the torch_dist format."""
    flags = [*oracle.MODEL, *oracle.TRAINING, *oracle.KINDS[kind]]
    flags = ["local" if word == "transformer_engine" else word for word in flags]
    flags = ["torch_dist" if word == "torch" else word for word in flags]
    return run([*flags, "--data-path", str(text), "--load", str(load), "--save", str(save), *more], expect=expect)


@pytest.mark.parametrize("kind", oracle.KEPT)
def test_fork_continues(kind: str, saved: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert("--load", saved / kind, "--save", tmp_path / "here") == 0
    printed = capsys.readouterr().out
    if "remoe" in kind:
        assert "exponent 8" in printed
    there = torch.load(saved / kind / "expected.pt", weights_only=True)
    logits = compute_logits(open_run(tmp_path / "here", None).model, there["tokens"])
    torch.testing.assert_close(logits, there["logits"], rtol=0, atol=2e-6)
    output = continued(kind, text, tmp_path / "here", tmp_path / "run")
    losses = step_losses(output)
    assert len(losses) == oracle.LAST - oracle.SAVED
    assert losses == pytest.approx(there["losses"], rel=5e-4 if "--bf16" in oracle.KINDS[kind] else 2e-6)
    if "remoe" in kind:
        assert series(output, "l1 coefficient")[0] == pytest.approx(1e-4 * 1.2**8, rel=1e-4)


def test_the_optimizers_state_is_the_forks(saved: Path, tmp_path: Path) -> None:
    """Every number is equal. In bfloat16, losses would hardly show a wrong state."""
    assert convert("--load", saved / "remoe", "--save", tmp_path / "here") == 0
    there, here = weights(saved / "remoe", oracle.SAVED), weights(tmp_path / "here", oracle.SAVED)
    compared = 0
    for key, value in there.items():
        if not key.startswith("optimizer.state."):
            continue
        numbered = key.replace("fp32_param", "param").replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")
        numbered = numbered.replace(".router.weight", ".router.relu_weight")
        layer = next((layer for layer in (0, 1) if f".layers.{layer}." in key), None)
        converted = here[numbered.replace(f".layers.{layer}.", ".layers.")]
        converted = converted if layer is None else converted[layer]
        if value.dim() > converted.dim():  # pieces: [experts or halves, ..., numbers]
            cuts = value.shape[:-1]
            local = [whole // cut for whole, cut in zip(converted.shape, cuts, strict=True)]
            order = [*range(0, 2 * len(local), 2), *range(1, 2 * len(local), 2)]
            split = [size for pair in zip(cuts, local, strict=True) for size in pair]
            converted = converted.reshape(split).permute(order).reshape(value.shape)
        assert torch.equal(value, converted), key
        compared += 1
    assert compared == 3 * (3 + 2 * 7)


def test_state_of_several_optimizers_is_put_together(saved: Path, tmp_path: Path) -> None:
    """With expert parallelism experts have a separate optimizer. The result is the same."""
    name = f"iter_{oracle.SAVED:07d}"
    source = saved / "remoe" / name
    content = {
        f"chained_{int('.experts.' in key)}.{key}" if key.startswith("optimizer.") else key: value
        for key, value in read_content(source, read_index(source)).items()
    }
    state = common_state(source)
    groups = state["optimizer"]["optimizer"]["param_groups"]
    experts = {"optimizer": {"param_groups": [groups[0] | {"is_expert_parallel": True}]}}
    state["optimizer"] = {0: state["optimizer"], 1: experts}
    write_content(content, state, tmp_path / "several", name)
    for load, save in ((saved / "remoe", "one"), (tmp_path / "several", "all")):
        assert convert("--load", load, "--save", tmp_path / save) == 0
    one, together = weights(tmp_path / "one", oracle.SAVED), weights(tmp_path / "all", oracle.SAVED)
    assert one.keys() == together.keys() and all(torch.equal(one[key], together[key]) for key in one)
    settings = [common_state(tmp_path / save / name)["optimizer"] for save in ("one", "all")]
    assert settings[0] == settings[1]
    assert [len(part["optimizer"]["param_groups"]) for part in settings[0].values()] == [2, 1]


def test_refusals(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refusal(name: str) -> str:
        assert convert("--load", tmp_path / name, "--save", tmp_path / "out") == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and not (tmp_path / "out").exists()
        return error

    shutil.copytree(saved / "dense", tmp_path / "cut")
    (tmp_path / "cut" / "iter_0000008" / ".metadata").unlink()
    assert ".metadata is missing" in refusal("cut")
    (tmp_path / "cut" / "iter_0000008" / "mp_rank_00").mkdir()
    shutil.copy(REPOSITORY / "tests/fork/one_file.pt", tmp_path / "cut/iter_0000008/mp_rank_00/model_optim_rng.pt")
    assert "--load FOLDER/torch_dist" in refusal("cut"), "NumPy 1.26 wrote this file"
    assert convert("--load", saved / "dense", "--save", tmp_path / "mine") == 0
    capsys.readouterr()
    assert "not a checkpoint of the authors' fork" in refusal("mine")


@pytest.mark.parametrize(("coefficient", "exponent"), [(1e-4 * 1.2**-30, -30), (1e-4 * 1.2**2.4, 2)])
def test_lambda_is_rounded_to_a_power(coefficient: float, exponent: int) -> None:
    """The exponent is rounded, so λ changes by at most a factor of √α."""
    args = argparse.Namespace(moe_relu_l1_reg_coeff_init=1e-4, moe_relu_l1_reg_coeff_multiplier=1.2)
    state = {"model": {COEFFICIENT: torch.tensor(1.0)}, "model1": {COEFFICIENT: torch.tensor(coefficient)}}
    result = _exponent(state, args)
    assert result == exponent and abs(math.log(1e-4 * 1.2**result / coefficient)) <= math.log(1.2) / 2 + 1e-6
