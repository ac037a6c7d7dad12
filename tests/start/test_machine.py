"""Test machines without a C compiler, Python's headers or a GPU, and settings that Megatron ignores or gets wrong."""

import argparse
import os
import re
import sys
import sysconfig
import types
from pathlib import Path

import pytest
import torch

from megatron.remoe.files.errors import UsageError
from megatron.remoe.start import checks, machine
from tools.recipes.megatron_values import make_parser


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Simulate a machine without programs in PATH and without environment variables for torch.compile."""
    for name in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE", "CC", "RANK"):
        monkeypatch.setenv(name, "")  # so that it is restored after the test
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", str(tmp_path))
    return monkeypatch


def add_program(folder: Path, name: str) -> None:
    (folder / name).touch(mode=0o755)


def double(values: torch.Tensor) -> torch.Tensor:
    return 2 * values


@pytest.mark.parametrize(("program", "variables", "missing"), [
    ("gcc", {}, ""),
    ("gcc", {"CC": "icc"}, "no C compiler (icc)"),  # Triton uses it without a check
    ("other", {"TORCH_COMPILE_DISABLE": "1"}, ""),  # set by the user
    ("gcc", {"include": "elsewhere"}, "elsewhere/Python.h (of python3-dev)"),
])  # fmt: skip
def test_what_compiling_needs(program: str, variables: dict[str, str], missing: str, without, capsys, tmp_path) -> None:
    add_program(tmp_path, program)
    for name, value in variables.items():
        without.setenv(name, value)
    if "include" in variables:
        without.setattr(sysconfig, "get_path", lambda *_: variables["include"])
    machine.disable_unavailable(on_cpu=False)
    said = capsys.readouterr().err
    assert missing in said and bool(said) == bool(missing)
    assert os.environ.get("TORCHDYNAMO_DISABLE") == ("1" if missing else None)
    if missing:
        assert torch.compile(double) is double, "the setting that the installed torch reads"


@pytest.mark.parametrize("on_cpu", [True, False])
def test_packages_that_megatron_must_not_find(on_cpu: bool, without: pytest.MonkeyPatch, tmp_path: Path) -> None:
    add_program(tmp_path, "gcc")
    for name in ("apex", "transformer_engine"):
        without.setitem(sys.modules, name, types.ModuleType(name))
    machine.disable_unavailable(on_cpu)
    found = {name for name in ("apex", "transformer_engine") if sys.modules[name] is not None}
    assert found == (set() if on_cpu else {"transformer_engine"})


def test_a_broken_transformer_engine_is_not_used(without, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Megatron would end with the error of its import, also with --transformer-impl local."""
    add_program(tmp_path, "gcc")
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("raise RuntimeError('curand not found')")
    without.syspath_prepend(tmp_path)
    for name in ("apex", "transformer_engine"):
        without.setitem(sys.modules, name, None)  # so that it is restored after the test
    del sys.modules["transformer_engine"]
    machine.disable_unavailable(on_cpu=False)
    assert sys.modules["transformer_engine"] is None and "curand not found" in capsys.readouterr().err


@pytest.mark.parametrize(("on_cpu", "program", "interpreted", "words"), [
    (True, "gcc", "0", "no GPU"),
    (False, "other", "0", "no C compiler (gcc or clang)"),
    (False, "gcc", "0", ""),
    (True, "other", "1", ""),
])  # fmt: skip
def test_triton_kernels_where_they_can_run(on_cpu, program: str, interpreted: str, words, without, tmp_path) -> None:
    pytest.importorskip("triton")
    add_program(tmp_path, program)
    without.setenv("TRITON_INTERPRET", interpreted)
    machine.check_kernels("torch", on_cpu)
    if not words:
        return machine.check_kernels("triton", on_cpu)
    with pytest.raises(UsageError, match=re.escape(words)) as refused:
        machine.check_kernels("triton", on_cpu)
    assert refused.value.code == "REMOE-E102"


BOTH = {"full_validation": True, "multiple_validation_sets": True}


@pytest.mark.parametrize(("given", "facts"), [
    ({"hybrid_layer_pattern": "*-", "num_experts": 8}, "E202 *- 8"),
    ({"hybrid_layer_pattern": "*", "multi_latent_attention": True}, "E202 * --multi-latent-attention"),
    ({"full_validation": True}, "E203 --full-validation --multiple-validation-sets"),
    (BOTH | {"virtual_pipeline_model_parallel_size": 2}, "E203 --full-validation virtual"),
    ({"rampup_batch_size": ["8"]}, "E203 --rampup-batch-size"),
    ({"step_batch_size_schedule": "0:8 9:16"}, "E203 --step-batch-size-schedule 0:8 --train-samples"),
    *(({name: "x"}, "E203 --sft --logits-load-dir") for name in ("fim_data", "sft", "logits_load_dir")),
    ({"dataloader_inter_document_masking": True}, "E203 --dataloader-inter-document-masking"),
    ({"inprocess_restart": True}, "E203 --inprocess-restart"),
    ({"reset_attention_mask": True, "pipeline_model_parallel_size": 3}, "E203 --reset-attention-mask"),
    ({"iterations_to_skip": [3], "pipeline_model_parallel_size": 3}, "E203 --iterations-to-skip"),
    ({"iterations_to_skip": [3, 4], "save": "x", "save_interval": 2}, "E203 --iterations-to-skip --save-interval"),
    ({"mtp_num_layers": 1, "pipeline_model_parallel_size": 2, "save": "x"}, "E203 --mtp-num-layers --untie-emb"),
    ({"mtp_num_layers": 1, "pipeline_model_parallel_size": 2, "load": "x"}, "E203 --mtp-num-layers --untie-emb"),
    ({"transformer_impl": "local", "recompute_modules": ["layernorm"]}, "E203 --recompute-modules layernorm"),
    ({"transformer_impl": "local", "save_dgrads_interval": 1}, "E203 --save-dgrads-interval"),
])  # fmt: skip
def test_settings_that_megatron_ignores_or_gets_wrong(given: dict[str, object], facts: str) -> None:
    fine = vars(make_parser().parse_args([])) | {"virtual_pipeline_model_parallel_size": None}
    for right in ({}, BOTH):
        checks.check_settings(argparse.Namespace(**fine | right))
    with pytest.raises(UsageError) as error:
        checks.check_settings(argparse.Namespace(**fine | given))
    message = f"{error.value} {error.value.code}"
    assert "\n" not in message and all(fact in message for fact in facts.split()), message
