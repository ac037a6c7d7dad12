"""Read a checkpoint that the authors' fork wrote as one file, with --ckpt-format torch and one model parallel rank."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ...console.errors import ConversionError
from .from_fsdp import NORMS
from .rewriting import Piece, encoded

EXPERT = re.compile(
    r"(?P<mlp>.*\.mlp\.experts\.)"
    r"(?:local_experts\.(?P<number>\d+)\.(?P<name>linear_fc[12]\.\w+)"
    r"|(?P<grouped>linear_fc[12]\.(?:weight|bias|_extra_state))(?P<last>\d*))"
)
IN_THE_FORK = (
    "Start the fork once more with its flags and --ckpt-convert-format torch_dist --ckpt-convert-save FOLDER, "
    "and convert FOLDER/torch_dist."
)


def read(folder: Path, state: dict[str, Any]) -> tuple[Iterator[Piece], Iterator[tuple[str, bytes]]]:
    """Return the tensors and objects of a file with this content, named as in the fork's distributed checkpoints.

    Raises:
        ConversionError: there are several files.
    """
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.pt"))
    if len(files) > 1:
        raise ConversionError(f"{folder}: has several files, {files[0]} and {files[1]}. {IN_THE_FORK}")
    weights = {name: value for name, value in state["model"].items() if torch.is_tensor(value) and value.dim()}
    return _pieces(weights, state), _objects(state)


def _pieces(weights: dict[str, torch.Tensor], state: dict[str, Any]) -> Iterator[Piece]:
    experts = _experts(state)
    tensors = {("", name): value for name, value in weights.items()}
    if "optimizer" in state:
        tensors |= _optimizer_state(weights, state["optimizer"])
    for (prefix, name), tensor in tensors.items():
        key, expert = _distributed_name(name)
        if expert is None:
            yield prefix + key, tuple(tensor.shape), (0,) * tensor.dim(), tensor
        else:
            yield prefix + key, (experts, *tensor.shape), (expert, *(0,) * tensor.dim()), tensor[None]


def _optimizer_state(weights: dict[str, torch.Tensor], saved: dict[str, Any]) -> dict[tuple[str, str], torch.Tensor]:
    """Return the optimizer's tensors by their kind and the weight's name.

    Weights are numbered in their order in the model, group by group: those with weight decay are matrices.
    """
    found: dict[tuple[str, str], torch.Tensor] = {}
    inner = saved.get("optimizer", saved)
    mains = list(itertools.chain.from_iterable(saved.get("fp32_from_fp16_params", [])))
    for group in inner["param_groups"]:
        names = [
            name
            for name, weight in weights.items()
            if bool(group["wd_mult"]) == (weight.dim() > 1 and not name.endswith(".bias"))
        ]
        if len(names) != len(group["params"]):
            raise ConversionError(f"--load: the optimizer has {len(group['params'])} weights where {len(names)} are.")
        for name, number in zip(names, group["params"], strict=True):
            kinds = {kind: value for kind, value in inner["state"][number].items() if kind != "step"}
            if mains:
                kinds["fp32_param"] = mains[number]
            found |= {(f"optimizer.state.{kind}.", name): value for kind, value in kinds.items()}
    return found


def _objects(state: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    experts = _experts(state)
    for name in state["model"]:
        if name.endswith("._extra_state"):
            key, expert = _distributed_name(name)
            each = range(experts) if expert is None else [expert]  # grouped experts have one together
            for place in [f"{one}_{experts}" for one in each] if ".mlp.experts." in key else ["0_1"]:
                yield f"{key}/shard_{place}", encoded([None])
    if "rng_state" in state:
        yield "rng_state/shard_0.0_1.1", encoded([state["rng_state"]])


def _experts(state: dict[str, Any]) -> int:
    return (state["args"].num_experts or 0) * state["args"].moe_granularity


def _distributed_name(name: str) -> tuple[str, int | None]:
    """Return a name in distributed checkpoints, and the number of its expert; None without one."""
    for local, key in NORMS.items():
        name = name.replace(local, key)
    match = EXPERT.fullmatch(name)
    if match is None:
        return name, None
    number = match["number"] or match["last"]
    return f"{match['mlp']}experts.{match['name'] or match['grouped']}", int(number) if number else None
