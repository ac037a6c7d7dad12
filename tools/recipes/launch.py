"""Turn a launch script's arguments and environment into the command that trains."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..console.flags import group_by_flag, split, without
from ..console.places import entry, home
from ..console.places import interpreter as default_interpreter
from . import data, hardware
from .layout import Layout, RecipeError, parse_count
from .models import PAPER, SAVE_INTERVALS, Routing, Size, Training

PROJECT = "remoe"
REPLACED = {  # the user's flag → the recipe's flag that Megatron refuses next to it
    "--fp16": "--bf16",
    "--train-samples": "--train-iters",
    "--lr-warmup-iters": "--lr-warmup-fraction",
    "--lr-warmup-samples": "--lr-warmup-fraction",
}


@dataclass(frozen=True)
class Recipe:
    """The settings of a launch script.

    Attributes:
        save_interval: iterations between two checkpoints.
        project: for Weights & Biases.
        output: folder of the run.
        interpreter: Python that trains.
        given: the user's flags for Megatron.
        is_dry_run: nothing is trained.
    """

    size: Size
    routing: Routing
    training: Training
    layout: Layout
    save_interval: int
    project: str
    output: str
    interpreter: str
    given: list[str]
    is_dry_run: bool


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
    return defaults | {name: parse_count(name, text) for name, text in texts.items() if text}, project


def read_recipe(size: str, kind: str, arguments: Sequence[str], environment: Mapping[str, str]) -> Recipe:
    """Return the settings of a launch script, given its arguments (those after -- too) and environment.

    Raises:
        RecipeError: an argument or a variable is wrong.
    """
    words, given = split(arguments)
    numbers, project = read_arguments(kind, words)
    expansion = numbers.get("ffn_expansion", 1)
    routing = Routing(kind, numbers.get("num_experts", 0), numbers.get("granularity", 1))
    end = f"ffn{4 * expansion}" if kind == "dense" else f"e{routing.experts}g{routing.granularity}"
    name = f"llama_{size}_{kind}_{end}" + ("" if project == PROJECT else f"_{project}")
    return Recipe(
        size=replace(PAPER[size], ffn=PAPER[size].ffn * expansion),
        routing=routing,
        training=Training(numbers["train_iters"], numbers["micro_batch_size"]),
        layout=Layout.read(numbers["gpus_per_node"], environment),
        save_interval=SAVE_INTERVALS[size],
        project=project,
        output=environment.get("OUTPUT_DIR") or str(home() / "runs" / name),
        interpreter=environment.get("PYTHON") or default_interpreter(),
        given=given,
        is_dry_run=data.is_set(environment, "DRY_RUN") or data.is_set(environment, "REHEARSE"),
    )


def make_launch(recipe: Recipe, environment: Mapping[str, str]) -> Launch:
    """Return the training run of a recipe.

    Raises:
        RecipeError: data, a node's address or rank, or GPUs are missing, or settings exclude each other.
    """
    data_flags, cache, notes = _choose_data(recipe, environment)
    depth = _depth_flags(recipe, environment.get("MODEL") or "gpt")
    launcher = recipe.layout.launcher(recipe.interpreter, environment, recipe.is_dry_run)
    hardware_flags, settings, more_notes = _choose_hardware(recipe, environment)
    flags = [
        *depth, *recipe.size.flags(), *recipe.training.flags(), *data_flags, *_output_flags(recipe, cache),
        *recipe.routing.flags(recipe.size.ffn), *recipe.layout.flags(recipe.routing.kind != "dense"), *hardware_flags,
    ]  # fmt: skip
    if environment.get("WANDB_API_KEY"):
        flags += ["--wandb-project", recipe.project, "--wandb-exp-name", Path(recipe.output).name]
        flags += ["--wandb-save-dir", recipe.output]
    replaced = {REPLACED[flag] for flag in group_by_flag(recipe.given) if flag in REPLACED}
    flags = [*without(flags, replaced), *recipe.given]
    return Launch(launcher, flags, settings, recipe.output, recipe.layout, [*notes, *more_notes])


def _choose_data(recipe: Recipe, environment: Mapping[str, str]) -> tuple[list[str], str, list[str]]:
    """Return the flags for vocabulary and data, the name of the folder of Megatron's indices, and notes."""
    data_path = data.find_data(environment, recipe.is_dry_run)
    parts = data.choose_split([] if "--split" in group_by_flag(recipe.given) else data_path)
    tokenizer, notes = data.find_vocabulary(environment, recipe.given, recipe.is_dry_run), []
    if not environment.get("DATA_PATH") and (missing := data.missing_shards(data_path)):
        notes.append(f"Shards missing: {' '.join(missing)}; all data sets are used, shard 00 too.")
    if parts != data.SPLITS[0]:
        notes.append(f"Split: {parts}, because the paper's {data.SPLITS[0]} leaves a part without documents")
    return [*tokenizer, "--data-path", *data_path, "--split", parts], data.cache_name(data_path), notes


def _choose_hardware(recipe: Recipe, environment: Mapping[str, str]) -> tuple[list[str], dict[str, str], list[str]]:
    """Return flags and environment variables for the machine, and notes."""
    kernels, has_experts = environment.get("KERNELS", ""), recipe.routing.kind != "dense"
    if kernels not in ("", "triton"):
        raise RecipeError(f"KERNELS={kernels}: choose triton, or leave it unset")
    fast = hardware.TRITON if kernels else []
    note = [f"KERNELS=triton: {' '.join(fast)}"] if fast else []
    if "--cpu" in recipe.given:
        settings = hardware.cpu_settings(environment)
        notes = [f"CPU: {name}={value}, for runs beside other programs" for name, value in settings.items()]
        return fast, settings, [*notes, *note]
    if not recipe.is_dry_run:
        hardware.check_gpus(recipe.layout.gpus_per_node, recipe.interpreter)
    values = hardware.deciding_values(recipe.layout, recipe.given)
    nodes = 1 if recipe.is_dry_run else recipe.layout.nodes
    flags, layers = hardware.gpu_flags(has_experts, kernels, values, recipe.interpreter, nodes)
    gpu = environment.get("GPU", "") if recipe.is_dry_run else None
    settings = hardware.gpu_settings(recipe.given, values, environment, gpu)
    return [*flags, *fast], settings, [f"Layers: {layers}", *note]


def _output_flags(recipe: Recipe, cache: str) -> list[str]:
    """Return the flags for evaluation, checkpoints and logs in the run's folder, with its subfolder for indices."""
    output = recipe.output
    return [
        *"--eval-interval 1000 --eval-iters 100".split(),
        *("--save", f"{output}/checkpoints", "--load", f"{output}/checkpoints"),
        *("--save-interval", str(recipe.save_interval), "--exit-signal-handler"),
        # Runs side by side on one data set must not read the other's half-written index.
        *("--data-cache-path", f"{output}/{cache}"),
        *("--tensorboard-dir", f"{output}/tensorboard", "--log-interval", "10", "--log-throughput"),
    ]


def _depth_flags(recipe: Recipe, model_class: str) -> list[str]:
    """Return the flags for the layers and their virtual stages."""
    size, layout = recipe.size, recipe.layout
    if model_class == "gpt":
        virtual = ["--num-virtual-stages-per-pipeline-rank", str(layout.vpp)] if layout.vpp > 1 else []
        return ["--num-layers", str(size.layers), *virtual]
    if model_class != "hybrid":
        raise RecipeError(f"MODEL={model_class}: choose gpt or hybrid")
    if "--num-layers" in group_by_flag(recipe.given):
        raise RecipeError(
            "MODEL=hybrid takes no --num-layers: give --hybrid-layer-pattern, such as '*E*E' for two layers with "
            "experts, or '*-*-' without"
        )
    stages = layout.pp * layout.vpp
    if size.layers % stages:  # Megatron would accept a pattern with fewer layers
        raise RecipeError(f"PP={layout.pp} x VPP={layout.vpp} does not divide the {size.layers} layers")
    return size.hybrid_flags(recipe.routing.kind, stages)
