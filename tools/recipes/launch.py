"""Turn a launch script's arguments and environment into the command that trains."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..console.flags import last_value, parse, split
from ..console.places import entry, home
from ..console.places import interpreter as default_interpreter
from . import data, hardware
from .layout import LARGEST, MOST_EXPERTS, Layout, RecipeError, whole_number
from .models import PAPER, SAVE_INTERVALS, Routing, Size, Training

PROJECT = "remoe"
# Beginnings of the flags that change what the layout has to divide.
MODEL_FLAGS = (
    "--num-layers", "--num-attention-heads", "--num-experts", "--moe-granularity", "--expert-tensor-parallel-size",
    "--hybrid-layer-pattern", "--pipeline-model-parallel-layout", "--decoder-", "--account-for-",
)  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """A training as a launch script starts it.

    Attributes:
        launcher: torchrun's words in front of the program.
        flags: Megatron's flags.
        settings: environment variables that it needs.
        output: folder of the run.
        layout: how its processes share the work.
        notes: lines about what was chosen.
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


def run_name(size: str, routing: Routing, expansion: int) -> str:
    """Return the name of a run, and of its folder; `expansion` is a dense model's, of its FFN over 4 x hidden."""
    end = f"ffn{4 * expansion}" if routing.kind == "dense" else f"e{routing.experts}g{routing.granularity}"
    return f"llama_{size}_{routing.kind}_{end}"


def read_arguments(routing: str, given: Sequence[str]) -> tuple[dict[str, int], str]:
    """Return a script's numbers by name, and the project's name; missing and empty arguments have their defaults.

    Raises:
        RecipeError: an argument is wrong.
    """
    last = {"ffn_expansion": 1} if routing == "dense" else {"num_experts": Routing.experts, "granularity": 1}
    defaults = {"gpus_per_node": 8, "train_iters": Training.iterations, "micro_batch_size": Training.micro_batch} | last
    if len(given) > len(defaults) + 1:
        raise RecipeError(f"too many arguments: {' '.join(given[len(defaults) + 1 :])}. Put Megatron's flags behind --")
    project = next(iter(given[len(defaults) :]), "") or PROJECT
    if "/" in project:
        raise RecipeError(f"project_name is '{project}': it becomes part of a folder's name; give it without /")
    numbers = dict(defaults)
    for name, text in zip(defaults, given, strict=False):
        if text:
            numbers[name] = whole_number(name, text, MOST_EXPERTS if name in last else LARGEST)
    if routing != "dense":
        whole_number("num_experts x granularity", str(numbers["num_experts"] * numbers["granularity"]), MOST_EXPERTS)
    return numbers, project


def plan(
    size: str, routing: str, arguments: Sequence[str], environment: Mapping[str, str], ask_for_packages: bool = True
) -> Launch:
    """Return the training that a launch script would start, given its arguments (also those behind --) and environment.

    `ask_for_packages` looks for Transformer Engine and apex, which takes seconds if they are installed.

    Raises:
        RecipeError: an argument or a variable is wrong.
    """
    given, extra = split(arguments)
    numbers, project = read_arguments(routing, given)
    planned = data.is_set(environment, "DRY_RUN") or data.is_set(environment, "REHEARSE")
    has_experts, expansion = routing != "dense", numbers.get("ffn_expansion", 1)
    model = replace(PAPER[size], ffn=PAPER[size].ffn * expansion)
    kind = Routing(routing, numbers.get("num_experts", 0), numbers.get("granularity", 1))
    name = run_name(size, kind, expansion) + (f"_{project}" if project != PROJECT else "")
    output = environment.get("OUTPUT_DIR") or str(home() / "runs" / name)
    notes = [] if has_experts else [f"FFN: {model.ffn} = {expansion} x 4 x {model.hidden}"]

    data_path, data_notes = data.find_data(environment, planned)
    parts, split_notes = data.choose_split([] if "--split" in parse(extra) else data_path)
    tokenizer = data.find_vocabulary(environment, extra, planned)
    interpreter, kernels = environment.get("PYTHON") or default_interpreter(), environment.get("KERNELS", "")
    fast = hardware.kernel_flags(kernels, interpreter)
    layout = Layout.read(numbers["gpus_per_node"], environment)

    if not any(word.startswith(MODEL_FLAGS) for word in extra):  # else Megatron checks the model that it builds
        layout.check(model.layers, model.heads, kind.experts * kind.granularity if has_experts else 0)
    depth = _depth_flags(model, routing, layout, environment.get("MODEL") or "gpt", extra)
    launcher = layout.launcher(interpreter, environment, planned)
    suited, engine = list[str](), ""
    if "--cpu" not in extra:
        if not planned:
            hardware.check_gpus(layout.gpus_per_node, environment, interpreter)
        suited, engine = hardware.gpu_flags(has_experts, kernels, extra, interpreter if ask_for_packages else "")
    flags = [
        *depth, *model.flags(), *Training(numbers["train_iters"], numbers["micro_batch_size"]).flags(),
        *tokenizer, "--data-path", *data_path, "--split", parts, *"--eval-interval 1000 --eval-iters 100".split(),
        "--save", f"{output}/checkpoints", "--load", f"{output}/checkpoints",
        "--save-interval", str(SAVE_INTERVALS[size]), "--exit-signal-handler",
        "--tensorboard-dir", f"{output}/tensorboard", *"--log-interval 10 --log-throughput".split(),
        *kind.flags(model.ffn), *layout.flags(has_experts), *suited, *fast,
    ]  # fmt: skip
    if environment.get("WANDB_API_KEY"):
        flags += ["--wandb-project", project, "--wandb-exp-name", name, "--wandb-save-dir", output]
    flags += extra
    gpu = environment.get("GPU", "") if planned else None
    settings = hardware.gpu_settings(flags, environment, gpu) if engine else {}
    notes += [*data_notes, *split_notes]
    if engine:
        notes.append(f"Layers: {engine}")
    if fast:
        notes.append(f"KERNELS=triton: {' '.join(fast)}, not tested on a GPU yet")
    return Launch(launcher, flags, settings, output, layout, notes)


def _depth_flags(size: Size, routing: str, layout: Layout, model_class: str, extra: Sequence[str]) -> list[str]:
    """Return the flags for the layers and their virtual stages."""
    if model_class not in ("gpt", "hybrid"):
        raise RecipeError(f"MODEL={model_class}: choose gpt or hybrid")
    if model_class == "hybrid":
        if last_value(extra, "--num-layers") is not None:
            raise RecipeError(
                "MODEL=hybrid takes no --num-layers: give --hybrid-layer-pattern, such as '*E*E' for two layers with "
                "experts, or '*-*-' without"
            )
        return size.layer_flags(routing, hybrid=True, stages=layout.pp * layout.vpp)
    virtual = ["--num-virtual-stages-per-pipeline-rank", str(layout.vpp)] if layout.vpp > 1 else []
    return [*size.layer_flags(routing), *virtual]
