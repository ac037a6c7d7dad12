"""Test that HybridModel (attention and MLP are separate layers) trains like GPTModel, and converts to it and back."""

import argparse
from dataclasses import fields, replace
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
from tests.training_runs import REPOSITORY, SMALL, TINY, records, run
from tools.console.display import Display
from tools.console.errors import ConversionError
from tools.models.analyze.command import layer_numbers
from tools.models.arguments import parse_convert
from tools.models.convert.model_class import convert_class
from tools.models.hf.opening import open_model, open_run
from tools.models.hf.weights import convert_model
from tools.models.hybrid import as_hybrid
from tools.recipes.launch import plan
from tools.recipes.models import PAPER, ROUTINGS

# λ₀ is large enough for the L1 term to show in the loss within the run.
RUN = [*RELU, "--moe-relu-l1-reg-coeff-init", "1e-3"]
SAVED, END = 2, 4
CLASSES = ("gpt", "hybrid")


class Runs:
    """Training runs of both classes that save checkpoints."""

    def __init__(self, entry: Entry, data: Path, folder: Path) -> None:
        self.entry, self.data, self.folder = entry, data, folder

    def run(self, *flags: str) -> dict[int, dict[str, str]]:
        """Train, and return each step's printed fields with all digits; layers have GPTModel's numbers."""
        code, output = self.entry.run([*TINY, "--train-iters", str(END), "--data-path", str(self.data), *flags], {}, [])
        assert code == 0, output[-3000:]
        steps = records(output)
        for step in steps.values():
            if "--hybrid-layer-pattern" in flags and (guarded := step.get("guarded layers")):
                step["guarded layers"] = ",".join(str(int(number) // 2) for number in guarded.split(","))
        return steps

    def saving(self, name: str, *flags: str) -> dict[int, dict[str, str]]:
        """Run a whole training that saves every `SAVED` steps."""
        return self.run(*RUN, *flags, "--save", str(self.folder / name), "--save-interval", str(SAVED))

    def resumed(self, name: str, *flags: str) -> dict[int, dict[str, str]]:
        """Resume from step `SAVED`, and return the steps after it."""
        return self.run(*RUN, *flags, "--load", str(self.folder / name), "--ckpt-step", str(SAVED))

    def exported(self, name: str) -> dict[str, torch.Tensor]:
        """Return the weights of step `SAVED` in the model for transformers."""
        run = open_run(self.folder / name, SAVED)
        return convert_model(run.model, run.config).state_dict()

    def converted(self, name: str, model: str) -> str:
        """Convert the checkpoint of step `SAVED` to the other class, and return its name."""
        places = ["--load", str(self.folder / name), "--save", str(self.folder / f"{name}-as-{model}")]
        flags = ["--model", model, *places, "--ckpt-step", str(SAVED)]
        output = run(["convert", *flags], script=REPOSITORY / "tools" / "__main__.py")
        assert "continue the training with --load" in output
        return f"{name}-as-{model}"


@pytest.fixture(scope="module")
def runs(entry: Entry, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(entry, data, tmp_path_factory.mktemp("hybrid"))


@pytest.mark.parametrize(
    ("pattern", "gpt"),
    [("*E*E", []), ("*-*E", ["--moe-layer-freq", "([0,1])"])],
    ids=["MoE layers", "dense and MoE layers"],
)
def test_one_training_in_two_classes(pattern: str, gpt: list[str], runs: Runs) -> None:
    """Losses, norms, S and λ agree to the last digit. Each class resumes from the other's converted checkpoint."""
    name, hybrid = pattern.replace("*", "a"), ["--hybrid-layer-pattern", pattern]
    expected = runs.saving(f"{name}-gpt", *gpt)
    assert len(expected) == END and "l1 coefficient" in expected[END]
    assert runs.saving(f"{name}-hybrid", *hybrid) == expected
    weights = [runs.exported(f"{name}-{model}") for model in ("gpt", "hybrid")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(one, weights[1][key]) for key, one in weights[0].items())
    expected = runs.resumed(f"{name}-gpt", *gpt)
    from_gpt, from_hybrid = (runs.converted(f"{name}-{a}", b) for a, b in (("gpt", "hybrid"), ("hybrid", "gpt")))
    assert runs.resumed(from_gpt, *hybrid) == expected
    assert runs.resumed(from_hybrid, *gpt) == expected
    if not gpt:  # Megatron can load it unconverted if all layers are alike
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


@pytest.mark.parametrize("size", PAPER)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_recipe_in_either_class_differs_only_in_its_layers(size: str, routing: str) -> None:
    gpt, hybrid = (plan(size, routing, ["8"], {"MODEL": model, "DRY_RUN": "1"}, False).flags for model in CLASSES)
    layers = PAPER[size].layers
    assert gpt[:2] == ["--num-layers", str(layers)] and gpt[2:] == hybrid[2:]
    assert hybrid[:2] == ["--hybrid-layer-pattern", ("*-" if routing == "dense" else "*E") * layers]


@pytest.mark.bulk
@pytest.mark.parametrize("parallel", ["TP", "EP", "PP"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_recipes_train_the_same_models(routing: str, parallel: str, entry: Entry, data: Path, tmp_path: Path) -> None:
    """50 steps from the same converted weights, in one process and in two; then each class continues the other's."""
    small = [*SMALL[2:], *"--eval-iters 0 --save-interval 25".split()]
    small += ["--moe-ffn-hidden-size", "128"] if routing != "dense" else []

    def train(model: str, name: str, processes: int, *flags: str) -> dict[int, float]:
        split = {parallel: "2"} if processes == 2 else {}
        stages = 2 if parallel == "PP" and split else 1
        depth = replace(PAPER["182m"], layers=2).layer_flags(routing, model == "hybrid", stages)
        place = {"MODEL": model, "OUTPUT_DIR": str(tmp_path / name), "DATA_PATH": str(data)}
        given = plan("182m", routing, [str(processes), "50", "2", "--", *small], place | split).flags
        code, output = entry.run([*given, *depth, *flags], processes=processes, limit=240)
        assert code == 0, output[-3000:]
        return {step: float(fields["lm loss"]) for step, fields in records(output).items()}

    def convert(name: str, model: str, *flags: str) -> Path:
        places = [tmp_path / name / "checkpoints", tmp_path / f"{name}-as-{model}" / "checkpoints"]
        words = ["convert", "--model", model, "--load", str(places[0]), "--save", str(places[1]), *flags]
        run(words, script=REPOSITORY / "tools" / "__main__.py")
        return places[1]

    train("gpt", "start", 1, "--train-iters", "1", "--save-interval", "1")
    start = {"gpt": tmp_path / "start" / "checkpoints", "hybrid": convert("start", "hybrid")}
    for processes in (1, 2) if parallel == "TP" else (2,):
        losses = {}
        for model, checkpoint in start.items():
            losses[model] = train(model, f"{model}{processes}", processes, "--pretrained-checkpoint", str(checkpoint))
        assert len(losses["gpt"]) == 50 and losses["hybrid"] == pytest.approx(losses["gpt"], rel=1e-6)
        for model, other in ((*CLASSES,), (*CLASSES[::-1],)):
            convert(f"{model}{processes}", other, "--ckpt-step", "25")
            continued = train(other, f"{model}{processes}-as-{other}", processes)
            assert continued == pytest.approx({step: losses["gpt"][step] for step in range(26, 51)}, rel=1e-6)


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
        convert_class(options, Display())
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
