"""Turn a launch script's arguments and environment into the command that trains."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..console.flags import group_by_flag, split, without
from ..console.places import entry, home
from ..console.places import interpreter as default_interpreter
from . import data, hardware
from .layout import Layout, RecipeError, whole_number
from .models import PAPER, SAVE_INTERVALS, Routing, Size, Training

PROJECT = "remoe"
REPLACED = {  # the user's flag → the recipe's flag that Megatron refuses next to it
    "--fp16": "--bf16",
    "--train-samples": "--train-iters",
    "--lr-warmup-iters": "--lr-warmup-fraction",
    "--lr-warmup-samples": "--lr-warmup-fraction",
}


@dataclass(frozen=True)
class Launch:
    """A training run as a launch script starts it.

    Attributes:
        launcher: torchrun's words in front of the program.
        flags: Megatron's flags.
        settings: environment variables that the run needs.
        output: folder of the run.
        layout: parallel sizes.
        notes: lines about the choices.
    """

    launcher: list[str]
    flags: list[str]
    settings: dict[str, str]
    output: str
    layout: Layout
    notes: list[str]

    @property
    def command(self) -> list[str]:
        """Return the words of the whole command, including the environment's settings."""
        settings = [f"{name}={value}" for name, value in self.settings.items()]
        environment = ["env", *settings] if settings else []
        return [*environment, *self.launcher, *entry(), *self.flags]

    def text(self) -> str:
        """Return the command as a line for a shell."""
        return f"{shlex.join(self.command)}\n"


def read_arguments(routing: str, given: Sequence[str]) -> tuple[dict[str, int], str]:
    """Return a script's numbers by name, and the project's name; missing and empty arguments get their defaults.

    Raises:
        RecipeError: an argument is wrong.
    """
    last = {"ffn_expansion": 1} if routing == "dense" else {"num_experts": Routing.experts, "granularity": 1}
    defaults = {"gpus_per_node": 8, "train_iters": Training.iterations, "micro_batch_size": Training.micro_batch} | last
    if len(given) > len(defaults) + 1:
        raise RecipeError(f"too many arguments: {' '.join(given[len(defaults) + 1 :])}. Put Megatron's flags after --")
    texts = dict(zip((*defaults, "project_name"), given, strict=False))
    project = texts.pop("project_name", "") or PROJECT
    return defaults | {name: whole_number(name, text) for name, text in texts.items() if text}, project


def plan(
    size: str, routing: str, arguments: Sequence[str], environment: Mapping[str, str], look_for_packages: bool = True
) -> Launch:
    """Return the run that a launch script would start, given its arguments (those after -- too) and environment.

    `look_for_packages` looks for Transformer Engine and apex, which takes seconds if they are installed.

    Raises:
        RecipeError: an argument or a variable is wrong.
    """
    given, extra = split(arguments)
    numbers, project = read_arguments(routing, given)
    planned = data.is_set(environment, "DRY_RUN") or data.is_set(environment, "REHEARSE")
    has_experts, expansion = routing != "dense", numbers.get("ffn_expansion", 1)
    model = replace(PAPER[size], ffn=PAPER[size].ffn * expansion)
    kind = Routing(routing, numbers.get("num_experts", 0), numbers.get("granularity", 1))
    end = f"e{kind.experts}g{kind.granularity}" if has_experts else f"ffn{4 * expansion}"
    name = f"llama_{size}_{routing}_{end}" + ("" if project == PROJECT else f"_{project}")
    output = environment.get("OUTPUT_DIR") or str(home() / "runs" / name)

    data_path = data.find_data(environment, planned)
    parts = data.choose_split([] if "--split" in group_by_flag(extra) else data_path)
    tokenizer = data.find_vocabulary(environment, extra, planned)
    interpreter, kernels = environment.get("PYTHON") or default_interpreter(), environment.get("KERNELS", "")
    if kernels not in ("", "triton"):
        raise RecipeError(f"KERNELS={kernels}: choose triton, or leave it unset")
    fast = hardware.TRITON if kernels else []
    layout = Layout.read(numbers["gpus_per_node"], environment)

    depth = _depth_flags(model, routing, layout, environment.get("MODEL") or "gpt", extra)
    launcher = layout.launcher(interpreter, environment, planned)
    suited, engine, settings = list[str](), "", hardware.cpu_settings(environment)
    if "--cpu" not in extra:
        if not planned:
            hardware.check_gpus(layout.gpus_per_node, interpreter)
        values = hardware.deciding_values(layout, extra)
        suited, engine = hardware.gpu_flags(
            has_experts, kernels, values, interpreter if look_for_packages else "", 1 if planned else layout.nodes
        )
        gpu = environment.get("GPU", "") if planned else None
        settings = hardware.gpu_settings(extra, values, environment, gpu)
    flags = [
        *depth, *model.flags(), *Training(numbers["train_iters"], numbers["micro_batch_size"]).flags(),
        *tokenizer, "--data-path", *data_path, "--split", parts, *"--eval-interval 1000 --eval-iters 100".split(),
        "--save", f"{output}/checkpoints", "--load", f"{output}/checkpoints",
        "--save-interval", str(SAVE_INTERVALS[size]), "--exit-signal-handler",
        # Runs side by side on one data set must not read the other's half-written index.
        "--data-cache-path", f"{output}/{data.cache_name(data_path)}",
        "--tensorboard-dir", f"{output}/tensorboard", *"--log-interval 10 --log-throughput".split(),
        *kind.flags(model.ffn), *layout.flags(has_experts), *suited, *fast,
    ]  # fmt: skip
    if environment.get("WANDB_API_KEY"):
        flags += ["--wandb-project", project, "--wandb-exp-name", Path(output).name, "--wandb-save-dir", output]
    replaced = {REPLACED[flag] for flag in group_by_flag(extra) if flag in REPLACED}
    flags = [*without(flags, replaced), *extra]
    notes = []
    if not environment.get("DATA_PATH") and (missing := data.missing_shards(data_path)):
        notes.append(f"Shards missing: {' '.join(missing)}; all data sets are used, shard 00 too.")
    if parts != data.SPLITS[0]:
        notes.append(f"Split: {parts}, because the paper's {data.SPLITS[0]} leaves a part without documents")
    if engine:
        notes.append(f"Layers: {engine}")
    if hardware.SPINNING in settings:
        notes.append(f"CPU: {hardware.SPINNING}={settings[hardware.SPINNING]}, for runs beside other programs")
    if fast:
        notes.append(f"KERNELS=triton: {' '.join(fast)}")
    return Launch(launcher, flags, settings, output, layout, notes)


def _depth_flags(size: Size, routing: str, layout: Layout, model_class: str, extra: Sequence[str]) -> list[str]:
    """Return the flags for the layers and their virtual stages."""
    if model_class not in ("gpt", "hybrid"):
        raise RecipeError(f"MODEL={model_class}: choose gpt or hybrid")
    if model_class == "hybrid":
        if "--num-layers" in group_by_flag(extra):
            raise RecipeError(
                "MODEL=hybrid takes no --num-layers: give --hybrid-layer-pattern, such as '*E*E' for two layers with "
                "experts, or '*-*-' without"
            )
        stages = layout.pp * layout.vpp
        if size.layers % stages:  # Megatron would accept a pattern with fewer layers
            raise RecipeError(f"PP={layout.pp} x VPP={layout.vpp} does not divide the {size.layers} layers")
        return size.hybrid_flags(routing, stages)
    virtual = ["--num-virtual-stages-per-pipeline-rank", str(layout.vpp)] if layout.vpp > 1 else []
    return ["--num-layers", str(size.layers), *virtual]
