"""A launch script's arguments and environment, made into the command that trains."""

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..common.flags import last_value, split
from ..common.places import ROOT
from . import data, hardware
from .layout import LARGEST, MOST_EXPERTS, Layout, RecipeError, whole_number
from .models import PAPER, SAVE_INTERVALS, Routing, Size, Training

ENTRY = ROOT / "pretrain_gpt.py"


@dataclass(frozen=True)
class Launch:
    """A training as a launch script starts it.

    Attributes:
        launcher: torchrun's words in front of the program.
        flags: Megatron's flags.
        settings: environment variables that it needs.
        output: folder of the run.
        layout: how its processes share the work.
        on_cpu: whether --cpu is given.
        notes: lines that tell the user what was chosen.
    """

    launcher: list[str]
    flags: list[str]
    settings: dict[str, str]
    output: str
    layout: Layout
    on_cpu: bool
    notes: list[str]

    @property
    def command(self) -> list[str]:
        """The words of the whole command, the environment's settings included."""
        settings = [f"{name}={value}" for name, value in self.settings.items()]
        return [*["env", *settings] * bool(settings), *self.launcher, str(ENTRY), *self.flags]

    def text(self) -> str:
        """Return the command as a line for a shell."""
        return f"{shlex.join(self.command)}\n"


def find_interpreter(environment: Mapping[str, str]) -> str:
    """Return PYTHON, else that of .venv, else python3."""
    venv = ROOT / ".venv" / "bin" / "python"
    return environment.get("PYTHON") or (str(venv) if os.access(venv, os.X_OK) else "python3")


def run_name(size: str, routing: Routing, expansion: int) -> str:
    """Return the name of a run, and of its folder; `expansion` is a dense model's, of its FFN over 4 x hidden."""
    end = f"ffn{4 * expansion}" if routing.kind == "dense" else f"e{routing.experts}g{routing.granularity}"
    return f"llama_{size}_{routing.kind}_{end}"


def plan(
    size: str, routing: str, arguments: Sequence[str], environment: Mapping[str, str], ask_for_packages: bool = True
) -> Launch:
    """Return the training that a launch script would start.

    Args:
        size: one of `PAPER`.
        routing: one of `ROUTINGS`.
        arguments: the script's, Megatron's flags behind -- included.
        environment: the script's.
        ask_for_packages: look for Transformer Engine and apex, which takes seconds where they are installed.

    Raises:
        RecipeError: an argument or a variable is wrong.
    """
    given, extra = split(arguments)
    planned = data.is_set(environment, "DRY_RUN") or data.is_set(environment, "REHEARSE")
    model, notes = PAPER[size], []
    names = ["gpus_per_node", "train_iters", "micro_batch_size"]
    names += ["ffn_expansion"] if routing == "dense" else ["num_experts", "granularity"]
    if len(given) > len(names) + 1:
        raise RecipeError(f"too many arguments: {' '.join(given[len(names) + 1 :])}. Put Megatron's flags behind --")
    project = next(iter(given[len(names) :]), "") or "remoe"
    if "/" in project:
        raise RecipeError(f"project_name is '{project}': it becomes part of a folder's name; give it without /")
    defaults = {"gpus_per_node": "8", "train_iters": "60000", "micro_batch_size": "16", "num_experts": "8"}
    texts = dict(zip(names, given, strict=False))
    most = dict.fromkeys(("num_experts", "granularity", "ffn_expansion"), MOST_EXPERTS)
    numbers = {
        name: whole_number(name, texts.get(name) or defaults.get(name, "1"), most.get(name, LARGEST)) for name in names
    }
    layout = Layout.read(numbers["gpus_per_node"], environment)

    expansion, experts = numbers.get("ffn_expansion", 1), 0
    kind = Routing(routing, numbers.get("num_experts", 8), numbers.get("granularity", 1))
    if routing == "dense":
        model = replace(model, ffn=model.ffn * expansion)
        notes.append(f"FFN: {model.ffn} = {expansion} x 4 x {model.hidden}")
    else:
        experts = kind.experts * kind.granularity
        whole_number("num_experts x granularity", str(experts), MOST_EXPERTS)
    name = run_name(size, kind, expansion) + (f"_{project}" if project != "remoe" else "")
    output = environment.get("OUTPUT_DIR") or str(ROOT / "runs" / name)

    interpreter = find_interpreter(environment)
    data_path, more_notes = data.find_data(environment, planned)
    notes += more_notes
    tokenizer = data.find_vocabulary(environment, extra, planned)
    kernels = environment.get("KERNELS", "")
    fast = hardware.kernel_flags(kernels, interpreter)
    expert_tp = "--expert-tensor-parallel-size"
    layout.check(model, experts, whole_number(expert_tp, last_value(extra, expert_tp) or str(layout.tp)))
    depth = _depth_flags(model, routing, layout, environment.get("MODEL") or "gpt", extra)
    on_cpu, engine, suited = "--cpu" in extra, "", []
    if not on_cpu:
        if not planned:
            hardware.check_gpus(layout.gpus_per_node, environment)
        suited, engine = hardware.gpu_flags(bool(experts), kernels, extra, interpreter if ask_for_packages else "")
    launcher = layout.launcher(interpreter, environment)
    flags = [
        *depth, *model.flags(), *Training(numbers["train_iters"], numbers["micro_batch_size"]).flags(),
        *tokenizer, "--data-path", *data_path, *"--split 969,30,1 --eval-interval 1000 --eval-iters 100".split(),
        "--save", f"{output}/checkpoints", "--load", f"{output}/checkpoints",
        "--save-interval", str(SAVE_INTERVALS[size]), "--exit-signal-handler",
        "--tensorboard-dir", f"{output}/tensorboard", *"--log-interval 10 --log-throughput".split(),
        *kind.flags(model.ffn), *layout.flags(bool(experts)), *suited, *fast,
    ]  # fmt: skip
    if environment.get("WANDB_API_KEY"):
        flags += ["--wandb-project", project, "--wandb-exp-name", name, "--wandb-save-dir", output]
    flags += extra
    settings = {}
    if engine:
        notes.append(f"Layers: {engine}")
        gpu = environment.get("GPU", "") if planned else None
        settings = hardware.gpu_settings(flags, environment, gpu)
    if fast:
        notes.append(f"KERNELS=triton: {' '.join(fast)}, not tested on a GPU yet")
    return Launch(launcher, flags, settings, output, layout, on_cpu, notes)


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
