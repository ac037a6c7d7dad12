"""Test that HybridModel (attention and MLP are separate layers) trains like GPTModel, and converts to and from it."""

import argparse
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.remoe.layer.layer import ReMoELayer
from megatron.remoe.layer.specs import with_router
from megatron.remoe.routing.router import ReLURouter
from tests.tiny_model import RELU, TOPK
from tests.training_runs import REPOSITORY, TINY, assert_equal, records, run
from tools.console.errors import ConversionError
from tools.models.arguments import parse_convert
from tools.models.convert.model_class import convert_class
from tools.models.hf.opening import open_model, open_run
from tools.models.hf.weights import convert_model
from tools.models.hybrid import as_hybrid

# λ₀ is large enough for the L1 term to show in the loss within the run.
RUN = [*RELU, "--moe-relu-l1-reg-coeff-init", "1e-3"]
SAVED, END = 2, 4


def train(data: Path, *flags: str) -> dict[int, dict[str, str]]:
    """Train, and return each step's printed fields with all digits; layers have GPTModel's numbers."""
    processes = 2 if any("model-parallel" in flag for flag in flags) else 1
    steps = records(run([*TINY, "--train-iters", str(END), "--data-path", str(data), *flags], processes))
    for step in steps.values():
        if "--hybrid-layer-pattern" in flags and (guarded := step.get("guarded layers")):
            step["guarded layers"] = ",".join(str(int(number) // 2) for number in guarded.split(","))
    return steps


def exported(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of step `SAVED` in the model for transformers."""
    run = open_run(folder, SAVED)
    return convert_model(run.model, run.config).state_dict()


def test_a_stage_without_experts_and_the_z_loss(data: Path) -> None:
    flags = "--hybrid-layer-pattern *-|*E --pipeline-model-parallel-size 2 --moe-z-loss-coeff 1e-3"
    assert "z_loss" in train(data, *RUN, *flags.split())[END]


SPLITS = ("", "--tensor-model-parallel-size 2 --sequence-parallel", "--pipeline-model-parallel-size 2")
FEATURES = [*RUN, *"--moe-shared-expert-intermediate-size 64 --moe-granularity 2".split()]
CASES = [("*E*E", "", RUN), ("*-*E", "--moe-layer-freq ([0,1])", FEATURES)]
for split in SPLITS:  # 52 steps after the conversion
    flags, cut = ["--train-iters", "54", *split.split()], "|" if "pipeline" in split else ""
    long = ((f"*{mlp}{cut}*{mlp}", "", [*routing, *flags]) for mlp, routing in (("-", []), ("E", TOPK), ("E", RUN)))
    CASES += [pytest.param(*case, marks=pytest.mark.bulk) for case in long]


@pytest.mark.parametrize(("pattern", "gpt", "both"), CASES)
def test_one_training_in_two_classes(pattern: str, gpt: str, both: list[str], data: Path, tmp_path: Path) -> None:
    """Losses, norms, S and λ agree to the last digit. Each class resumes from the other's converted checkpoint."""
    models = {"gpt": [*both, *gpt.split()], "hybrid": [*both, "--hybrid-layer-pattern", pattern]}

    def resumed(folder: str, model: str) -> dict[int, dict[str, str]]:
        return train(data, *models[model], "--load", str(tmp_path / folder), "--ckpt-step", str(SAVED))

    saving = ["--save-interval", str(SAVED), "--save"]
    whole, hybrid = (train(data, *flags, *saving, str(tmp_path / model)) for model, flags in models.items())
    assert len(whole) >= END and ("l1 coefficient" in whole[END]) == ("--moe-relu-routing" in both)
    assert hybrid == whole
    assert_equal(exported(tmp_path / "hybrid"), exported(tmp_path / "gpt"))
    expected = resumed("gpt", "gpt")
    for source, model in (("gpt", "hybrid"), ("hybrid", "gpt")):
        places = ["--load", str(tmp_path / source), "--save", str(tmp_path / f"as {model}"), "--ckpt-step", str(SAVED)]
        run(["convert", "--model", model, *places], script=REPOSITORY / "tools" / "__main__.py")
        assert resumed(f"as {model}", model) == expected
    if not gpt:  # Megatron can load it unconverted if all layers are alike
        assert resumed("gpt", "hybrid") == expected


def test_multi_token_prediction(data: Path, tmp_path: Path) -> None:
    """MTP layers are not converted, and remoe analyze leaves them out."""
    flags = ["--hybrid-layer-pattern", "*E*E/*E", "--train-iters", "2"]
    train(data, *RUN, *flags, "--save", str(tmp_path), "--save-interval", "9")
    options = parse_convert(["--load", str(tmp_path), "--save", str(tmp_path / "gpt"), "--model", "gpt"])
    with pytest.raises(ConversionError, match="multi-token prediction are not converted"):
        convert_class(options)
    assert open_model(tmp_path, needs_tokenizer=False).layer_numbers() == [2, 4]


@pytest.mark.parametrize(("name", "value"), [("moe_baseline_router", "hash"), ("multi_latent_attention", True)])
def test_models_without_a_hybrid(name: str, value: object) -> None:
    """Hash routing depends on the layers' numbers; no program starts `*` with latent attention."""
    args = argparse.Namespace(**{name: value, "num_layers": 2, "num_experts": 8, "moe_layer_freq": 1})
    with pytest.raises(ConversionError, match=name.replace("_", "-")) as error:
        as_hybrid(args)
    assert error.value.code == "REMOE-E512"


def test_transformer_engines_stack_takes_the_router() -> None:
    """Of all layers in Megatron's own specification, only the MoE layer is replaced."""
    stack = with_router(hybrid_stack_spec)
    layer = stack.submodules.moe_layer.submodules.mlp
    assert layer.func is ReMoELayer and layer.keywords["submodules"].router is ReLURouter
    for kind in fields(stack.submodules):
        same = getattr(stack.submodules, kind.name) is getattr(hybrid_stack_spec.submodules, kind.name)
        assert same == (kind.name != "moe_layer"), kind.name
