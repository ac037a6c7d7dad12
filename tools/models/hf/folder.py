"""Read an exported folder. All fields and tensors are checked; code, pickles and adapters are never used.

`from_pretrained` is not safe enough: it runs or asks to run code in the folder, loads adapters, falls back to pickles,
follows paths out of the folder, replaces fields by defaults, and fills missing tensors with random numbers.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from megatron.remoe.hf import RemoeConfig

from ...console.errors import ConversionError
from .tensors import Tensors, check_tensors, shapes_of

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F64", "F32", "F16", "BF16"}
LAYER = re.compile(r"model\.layers\.(\d+)\.")
SHOWN = 3  # tensors named in an error


class Rule(NamedTuple):
    """A test of a field's value, and its description."""

    fits: Callable[[Any], bool]
    text: str


def _whole(least: int) -> Rule:
    return Rule(lambda value: type(value) is int and least <= value < 2**31, f"a whole number of at least {least}")


def _number(text: str, fits: Callable[[float], bool]) -> Rule:
    # Comparisons with NaN are false.
    return Rule(lambda value: type(value) in (int, float) and abs(value) < 1e300 and fits(value), text)


def _one_of(*values: Any) -> Rule:
    return Rule(
        lambda value: any(type(value) is type(one) and value == one for one in values),
        " or ".join(map(json.dumps, values)),
    )


def _is_rope(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {"rope_type", "rope_theta"}:
        return False
    return value["rope_type"] == "default" and THETA.fits(value["rope_theta"])


def _is_token(value: Any) -> bool:
    return value is None or POSITIVE_OR_0.fits(value)


POSITIVE, POSITIVE_OR_0, FLAG = _whole(1), _whole(0), Rule(lambda value: type(value) is bool, "true or false")
THETA = _number("a number of at least 1", lambda value: value >= 1)
SIZE_OR_NONE = Rule(lambda value: value is None or POSITIVE.fits(value), "null or a whole number of at least 1")
TOKEN = Rule(_is_token, "null or the number of a token")
SIZES = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
max_position_embeddings num_experts_per_tok""".split()
FLAGS = """norm_topk_prob router_expert_bias hash_routing output_router_logits shared_expert_gate
moe_relu_load_balancing""".split()
REQUIRED = {
    "model_type": _one_of("remoe"),
    **dict.fromkeys(SIZES, POSITIVE),
    "num_experts": POSITIVE_OR_0,
    "moe_intermediate_size": POSITIVE_OR_0,
    "rms_norm_eps": _number("a number above 0, at most 1", lambda value: 0 < value <= 1),
    "rope_parameters": Rule(_is_rope, 'an object of "rope_type": "default" and a "rope_theta" of at least 1'),
    "tie_word_embeddings": FLAG,
    "moe_relu_routing": FLAG,
}
OPTIONAL = {
    "qk_norm": _one_of(None, "head", "all_heads"),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), SIZE_OR_NONE),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), POSITIVE_OR_0),
    "rope_interleave": _one_of(True),
    "shared_expert_intermediate_size": POSITIVE_OR_0,
    "mlp_only_layers": Rule(
        lambda value: isinstance(value, list) and all(map(POSITIVE_OR_0.fits, value)), "a list of layers, from 0"
    ),
    "max_experts_per_token": SIZE_OR_NONE,
    "scoring_func": _one_of("softmax", "sigmoid"),
    **dict.fromkeys(FLAGS, FLAG),
    "routed_scaling_factor": _number("a number above 0", lambda value: value > 0),
    "router_aux_loss_coef": _number("a number of at least 0", lambda value: value >= 0),
    "router_dtype": _one_of(None, "float32", "float64"),
    "dtype": _one_of("float32", "bfloat16", "float16"),
    "initializer_range": _number("a number from 0 to 1", lambda value: 0 <= value <= 1),
    "attention_dropout": _number("a number from 0, below 1", lambda value: 0 <= value < 1),
    "hidden_act": _one_of("silu"),
    "attention_bias": _one_of(False),
    "mlp_bias": _one_of(False),
    "quantization_config": _one_of(None),
    "bos_token_id": TOKEN,
    "pad_token_id": TOKEN,
    "eos_token_id": Rule(
        lambda value: _is_token(value) or (isinstance(value, list) and all(map(POSITIVE_OR_0.fits, value))),
        "null, the number of a token, or a list of them",
    ),
}


def read_config(folder: Path) -> RemoeConfig:
    """Return the model's configuration; fields that the model does not use are ignored.

    Raises:
        ConversionError: config.json cannot be read, or a field is missing or wrong; the message names it.
    """
    path = folder / "config.json"
    fields = read_object(path)
    if (folder / "adapter_config.json").exists():
        raise ConversionError(f"{folder}: holds an adapter. Merge it into the model and save that.")
    for name, rule in (REQUIRED | OPTIONAL).items():
        if name in fields and not rule.fits(fields[name]):
            value = json.dumps(fields[name])
            raise ConversionError(f"{path}: {name} is {value[:60]}, and must be {rule.text}.")
        if name in REQUIRED and name not in fields:
            raise ConversionError(f"{path}: has no {name}, which must be {rule.text}.")
    if problem := _conflict(fields):
        raise ConversionError(f"{path}: {problem}.")
    known = {name: value for name, value in fields.items() if name in REQUIRED | OPTIONAL and name != "model_type"}
    try:
        return RemoeConfig(**known)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ConversionError(f"{path}: {str(error).rpartition('Error: ')[2]}") from error


def _conflict(fields: dict[str, Any]) -> str | None:
    """Return a conflict between fields that are valid by themselves, as text; None if there is none."""
    heads, groups, layers = (fields[f"num_{name}"] for name in ("attention_heads", "key_value_heads", "hidden_layers"))
    if heads % groups:
        return f"num_key_value_heads {groups} does not divide num_attention_heads {heads}"
    if fields["head_dim"] % 2:
        return f"head_dim {fields['head_dim']} is odd"
    if fields.get("kv_lora_rank") is not None:
        sizes = [fields.get(name, 0) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")]
        if not all(sizes) or sizes[1] != fields["head_dim"] or heads != groups:
            return "kv_lora_rank needs qk_nope_head_dim, qk_rope_head_dim = head_dim, v_head_dim and no grouped heads"
    if fields["num_experts"] and not fields["moe_intermediate_size"]:
        return "moe_intermediate_size is 0, and num_experts is not"
    if wrong := [layer for layer in fields.get("mlp_only_layers", []) if layer >= layers]:
        return f"mlp_only_layers names layer {wrong[0]} of num_hidden_layers {layers}"
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = fields.get(name)
        if any(one >= fields["vocab_size"] for one in (ids if isinstance(ids, list) else [ids or 0])):
            return f"{name} {ids} is not below vocab_size {fields['vocab_size']}"
    return None


def read_tensors(folder: Path, config: RemoeConfig) -> Iterator[Tensors]:
    """Check the names, shapes and types of all tensors, then return an iterator that reads them one by one.

    Raises:
        ConversionError: a file is missing, damaged or outside the folder; a tensor is missing, unexpected or has
            another shape or type; while reading, one holds NaN or infinity.
    """
    places: dict[str, Path] = {}
    found: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        for name, shape, dtype in headers(path):
            if name in places:
                raise ConversionError(f"{folder}: {name} is in {places[name].name} and in {path.name}.")
            if dtype not in DTYPES:
                raise ConversionError(f"{path}: {name} has the type {dtype}, and must have one of {sorted(DTYPES)}.")
            places[name], found[name] = path, shape
    layers = 1 + max((int(match[1]) for name in found if (match := LAYER.match(name))), default=-1)
    if layers != config.num_hidden_layers:
        raise ConversionError(
            f"{folder}: config.json says num_hidden_layers {config.num_hidden_layers}, and there are tensors of "
            f"{layers} layers."
        )
    try:
        shapes = shapes_of(config)
    except RuntimeError as error:
        raise ConversionError(f"{folder / 'config.json'}: its sizes are too large ({error}).") from error
    for names, problem in (
        (shapes.keys() - found.keys(), "are missing"),
        (found.keys() - shapes.keys(), "do not belong to the model of config.json"),
        (
            {f"{name} {list(found[name])}" for name in shapes.keys() & found.keys() if found[name] != shapes[name]},
            "have other shapes than config.json calls for",
        ),
    ):
        if names:
            shown = ", ".join(sorted(names)[:SHOWN]) + ", ..." * (len(names) > SHOWN)
            raise ConversionError(f"{folder}: {len(names)} tensors {problem}: {shown}. Export or copy the model again.")
    return _read(folder, places, shapes)


def _read(folder: Path, places: dict[str, Path], shapes: dict[str, torch.Size]) -> Iterator[Tensors]:
    for path in sorted(set(places.values())):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  not a dictionary
                yield check_tensors(folder, shapes, {name: file.get_tensor(name)})


def headers(path: Path) -> list[tuple[str, tuple[int, ...], str]]:
    """Return name, shape and type of each tensor in a file."""
    try:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return [(name, tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()]
    except (OSError, SafetensorError) as error:
        raise ConversionError(f"{path}: cannot be read ({error}). Export or copy the model again.") from error


def weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.exists():
        pickled = " Files like pytorch_model.bin can run code and are not read." * any(folder.glob("*.bin"))
        raise ConversionError(f"{folder}: has no {WEIGHTS}.{pickled} Save the model with save_pretrained.")
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ConversionError(f"{index}: its weight_map must be an object of tensors and files.")
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ConversionError(f"{index}: names {name!r}, and must name .safetensors files in its own folder.")
    return [folder / name for name in sorted(set(names.values()))]


def read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{path}: cannot be read ({error}).") from error
    if not isinstance(found, dict):
        raise ConversionError(f"{path}: must hold a JSON object.")
    return found
