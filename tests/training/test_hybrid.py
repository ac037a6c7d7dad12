"""Test that HybridModel (attention and MLP are separate layers) trains like GPTModel, and converts to it and back."""

import argparse
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.remoe.layer.layer import ReMoELayer
from megatron.remoe.layer.specs import with_relu_routing
from megatron.remoe.routing.router import ReLURouter
from megatron.remoe.training.run_log import read_run_log
from tests.entry import Entry
from tests.tiny_model import RELU, TOPK
from tests.training_runs import REPOSITORY, TINY, records, run
from tools.console.errors import ConversionError
from tools.models.analyze.command import layer_numbers
from tools.models.arguments import parse_convert
from tools.models.convert.model_class import convert_class
from tools.models.hf.opening import open_model, open_run
from tools.models.hf.weights import convert_model
from tools.models.hybrid import as_hybrid

# λ₀ is large enough for the L1 term to show in the loss within the run.
RUN = [*RELU, "--moe-relu-l1-reg-coeff-init", "1e-3"]
SAVED, END = 2, 4


class Runs:
    """Training runs of both classes that save checkpoints."""

    def __init__(self, entry: Entry, data: Path, folder: Path) -> None:
        self.entry, self.data, self.folder = entry, data, folder

    def run(self, *flags: str) -> dict[int, dict[str, str]]:
        """Train, and return each step's printed fields with all digits; layers have GPTModel's numbers."""
        processes = 2 if any("model-parallel" in flag for flag in flags) else 1
        given = [*TINY, "--train-iters", str(END), "--data-path", str(self.data), *flags]
        code, output = self.entry.run(given, processes=processes, limit=240)
        assert code == 0, output[-3000:]
        steps = records(output)
        for step in steps.values():
            if "--hybrid-layer-pattern" in flags and (guarded := step.get("guarded layers")):
                step["guarded layers"] = ",".join(str(int(number) // 2) for number in guarded.split(","))
        return steps

    def saving(self, name: str, *flags: str) -> dict[int, dict[str, str]]:
        """Make a whole run that saves every `SAVED` steps."""
        return self.run(*flags, "--save", str(self.folder / name), "--save-interval", str(SAVED))

    def resumed(self, name: str, *flags: str) -> dict[int, dict[str, str]]:
        """Resume from step `SAVED`, and return the steps after it."""
        return self.run(*flags, "--load", str(self.folder / name), "--ckpt-step", str(SAVED))

    def exported(self, name: str) -> dict[str, torch.Tensor]:
        """Return the weights of step `SAVED` in the model for transformers."""
        run = open_run(self.folder / name, SAVED)
        return convert_model(run.model, run.config).state_dict()

    def converted(self, name: str, model: str) -> str:
        """Convert the checkpoint of step `SAVED` to the other class, and return its name."""
        places = ["--load", str(self.folder / name), "--save", str(self.folder / f"{name}-as-{model}")]
        flags = ["--model", model, *places, "--ckpt-step", str(SAVED)]
        run(["convert", *flags], script=REPOSITORY / "tools" / "__main__.py")
        return f"{name}-as-{model}"


@pytest.fixture(scope="module")
def runs(entry: Entry, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(entry, data, tmp_path_factory.mktemp("hybrid"))


SPLITS = ("", "--tensor-model-parallel-size 2 --sequence-parallel", "--pipeline-model-parallel-size 2")
CASES = [("*E*E", "", RUN), ("*-*E", "--moe-layer-freq ([0,1])", RUN)]
for split in SPLITS:  # 50 steps after the conversion
    flags, cut = ["--train-iters", "54", *split.split()], "|" if "pipeline" in split else ""
    long = ((f"*{mlp}{cut}*{mlp}", "", [*routing, *flags]) for mlp, routing in (("-", []), ("E", TOPK), ("E", RUN)))
    CASES += [pytest.param(*case, marks=pytest.mark.bulk) for case in long]


@pytest.mark.parametrize(("pattern", "gpt", "both"), CASES)
def test_one_training_in_two_classes(
    pattern: str, gpt: str, both: list[str], entry: Entry, data: Path, tmp_path: Path
) -> None:
    """Losses, norms, S and λ agree to the last digit. Each class resumes from the other's converted checkpoint."""
    runs, name = Runs(entry, data, tmp_path), "run"
    hybrid, alike = [*both, "--hybrid-layer-pattern", pattern], not gpt
    gpt = [*both, *gpt.split()]
    expected = runs.saving(f"{name}-gpt", *gpt)
    assert len(expected) >= END and ("l1 coefficient" in expected[END]) == ("--moe-relu-routing" in both)
    assert runs.saving(f"{name}-hybrid", *hybrid) == expected
    weights = [runs.exported(f"{name}-{model}") for model in ("gpt", "hybrid")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(one, weights[1][key]) for key, one in weights[0].items())
    expected = runs.resumed(f"{name}-gpt", *gpt)
    of_gpt, of_hybrid = (runs.converted(f"{name}-{a}", b) for a, b in (("gpt", "hybrid"), ("hybrid", "gpt")))
    assert runs.resumed(of_gpt, *hybrid) == expected
    assert runs.resumed(of_hybrid, *gpt) == expected
    if alike:  # Megatron can load it unconverted if all layers are alike
        assert runs.resumed(f"{name}-gpt", *hybrid) == expected


WITH = {  # features of layers, and other routings
    "shared expert and granularity": [*RUN, *"--moe-shared-expert-intermediate-size 64 --moe-granularity 2".split()],
    "MoE recompute in chunks": [
        *RUN,
        *"--recompute-granularity selective --recompute-modules moe --moe-relu-activation-limit 1".split(),
    ],
    "Megatron's layers in bf16": [*RUN, "--no-local-layer-fusion", "--bf16"],
    "top-k": TOPK,
}


@pytest.mark.parametrize("kind", WITH)
def test_with_what_layers_can_do(kind: str, runs: Runs) -> None:
    flags = [*WITH[kind], "--train-iters", "3"]
    assert runs.run(*flags, "--hybrid-layer-pattern", "*E*E") == runs.run(*flags)


def test_multi_token_prediction(runs: Runs) -> None:
    """Megatron numbers MTP layers from 1 again, but only the decoder's flips count. MTP layers are not converted."""
    folder = runs.folder / "flips"
    runs.run(
        *[*RUN, "--hybrid-layer-pattern", "*E*E/*E", "--train-iters", "2", "--moe-log-flips-interval", "1"],
        *["--save", str(folder), "--save-interval", "9"],
    )
    (flips,) = [record for record in read_run_log(folder / "metrics.jsonl") if record["kind"] == "flips"]
    assert flips["layer_rate"].keys() == {"2", "4"}
    assert flips["rate"] == pytest.approx(sum(flips["layer_rate"].values()) / 2)
    options = parse_convert(["--load", str(folder), "--save", str(folder / "gpt"), "--model", "gpt"])
    with pytest.raises(ConversionError, match="multi-token prediction are not converted"):
        convert_class(options)
    looked_at = layer_numbers(open_model(folder, needs_tokenizer=False))
    assert [*map(str, looked_at)] == [*flips["layer_rate"]], "remoe analyze has the log's numbers"


def test_hash_stays_in_its_class() -> None:
    """Hash routing depends on the layers' numbers."""
    args = argparse.Namespace(moe_baseline_router="hash", num_layers=2, num_experts=8, moe_layer_freq=1)
    with pytest.raises(ConversionError, match="--moe-baseline-router hash"):
        as_hybrid(args)


def test_transformer_engines_stack_takes_the_router() -> None:
    """Of all kinds of layers in Megatron's own specification, only the MoE layer is replaced."""
    stack = with_relu_routing(hybrid_stack_spec)
    layer = stack.submodules.moe_layer.submodules.mlp
    assert layer.func is ReMoELayer and layer.keywords["submodules"].router is ReLURouter
    for kind in fields(stack.submodules):
        same = getattr(stack.submodules, kind.name) is getattr(hybrid_stack_spec.submodules, kind.name)
        assert same == (kind.name != "moe_layer"), kind.name
