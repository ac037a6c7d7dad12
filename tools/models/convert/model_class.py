"""Convert a GPTModel's checkpoint to a HybridModel's or back, optimizer state included.

A GPTModel's layer has attention and MLP, a HybridModel's only one of them. Weights, optimizer state and λ are the same
numbers under other names, so stored pieces are copied one by one.
"""

import argparse
import re
from typing import Any

from megatron.remoe.start.checkpoint_files import common_state

from ...console.display import Display
from ...console.errors import ConversionError
from ..checkpoints import Checkpoint, find
from ..hybrid import FINAL_NORM, as_gpt, as_hybrid, hybrid_layer
from .rewriting import OBJECT, Place, encoded, objects, read_each, rewritten, tensors

# With these the optimizer's state is stored under the weights' names.
RESHARDABLE = ("fully_reshardable", "fully_sharded_model_space")
LAYER = re.compile(r"(?P<before>(?:.*\.)?decoder\.layers\.)(?:(?P<number>\d+)\.)?(?P<rest>.+)")
# An empty object that GPTModel does not have.
ONLY_HYBRID = "output_layer._extra_state"


class Names:
    """Names of stored pieces in the other class.

    Args:
        number_of_layers: of the GPTModel.
        is_stacked: the GPTModel stores each kind of weight of all layers in one tensor, as it does if layers are alike.
        to: "gpt" or "hybrid".
    """

    def __init__(self, number_of_layers: int, is_stacked: bool, to: str) -> None:
        self.layers, self.is_stacked, self.to = number_of_layers, is_stacked, to

    def of_tensor(self, key: str, shape: Place, offset: Place) -> tuple[str, Place, Place]:
        """Return the new key, shape of the whole tensor and offset of a piece in it."""
        match = LAYER.fullmatch(key)
        if match is None:
            return self._outside(key), shape, offset
        if self.to == "hybrid":
            layer = offset[0] if self.is_stacked else int(match["number"])
            rest = (shape[1:], offset[1:]) if self.is_stacked else (shape, offset)
            return self._numbered(match, hybrid_layer(layer, match["rest"])), *rest
        layer = int(match["number"]) // 2
        if self.is_stacked:
            return match["before"] + match["rest"], (self.layers, *shape), (layer, *offset)
        return self._numbered(match, layer), shape, offset

    def of_object(self, key: str) -> str | None:
        """Return the name of an object; None if the other class has none."""
        match = LAYER.fullmatch(key)
        if match is None:
            return None if self.to == "gpt" and key.startswith(ONLY_HYBRID) else self._outside(key)
        if not self.is_stacked:
            layer = int(match["number"])
            number = layer // 2 if self.to == "gpt" else hybrid_layer(layer, match["rest"])
            return self._numbered(match, number)
        parts = OBJECT.fullmatch(match["rest"])
        assert parts is not None, key
        offset, shape = parts["offset"], parts["shape"]
        if self.to == "hybrid":
            (first, _, offset), (_, _, shape) = offset.partition("."), shape.partition(".")
            number = hybrid_layer(int(first), match["rest"])
            return f"{match['before']}{number}.{parts['key']}/shard_{offset or 0}_{shape or 1}"
        layer = int(match["number"]) // 2
        alone = (offset, shape) == ("0", "1")
        offset, shape = (f"{layer}", f"{self.layers}") if alone else (f"{layer}.{offset}", f"{self.layers}.{shape}")
        return f"{match['before']}{parts['key']}/shard_{offset}_{shape}"

    def _outside(self, key: str) -> str:
        source = "gpt" if self.to == "hybrid" else "hybrid"
        return key.replace(FINAL_NORM[source], FINAL_NORM[self.to])

    def _numbered(self, match: re.Match[str], number: int) -> str:
        return f"{match['before']}{number}.{match['rest']}"


def convert_class(options: argparse.Namespace, display: Display) -> None:
    """Write the checkpoint under `options.load` for the other class, `options.model`, to `options.save`.

    Raises:
        ConversionError: it is of that class already, the other one cannot express its layers, or it cannot be read
            or written.
    """
    checkpoint = find(options.load, options.ckpt_step)
    index = checkpoint.index
    state = common_state(checkpoint.folder)
    args, names = _target(checkpoint, options.model, index.state_dict_metadata)
    _check_optimizer(checkpoint)
    state |= {"args": args}
    with rewritten(checkpoint.folder, options.save, state) as writer, display.step("copying", len(index.storage_data)):
        for key, shape, offset, tensor in read_each(checkpoint.folder, tensors(checkpoint.folder, index)):
            name, new_shape, new_offset = names.of_tensor(key, shape, offset)
            if len(new_shape) != len(shape):
                tensor = tensor[0] if len(new_shape) < len(shape) else tensor[None]
            writer.add_tensor(name, new_shape, new_offset, tensor)
            display.advance(1)
        for key, content in read_each(checkpoint.folder, objects(checkpoint.folder, index)):
            if (other := names.of_object(key)) is not None:
                writer.add_object(other, content)
            display.advance(1)
        if names.to == "hybrid":
            writer.add_object(f"{ONLY_HYBRID}/shard_0_1", encoded([None]))
    pattern = f"--hybrid-layer-pattern '{args.hybrid_layer_pattern}'"
    flags = pattern if options.model == "hybrid" else f"--num-layers {args.num_layers}"
    if options.model == "gpt" and isinstance(args.moe_layer_freq, list):
        flags += f" --moe-layer-freq '{str(args.moe_layer_freq).replace(' ', '')}'"
    display.say(
        f"wrote {options.save}, {checkpoint.folder.name}; continue the training with --load {options.save} {flags}"
    )


def _target(checkpoint: Checkpoint, to: str, stored: dict[str, Any]) -> tuple[argparse.Namespace, Names]:
    """Return the arguments of the training that continues, and the names in its checkpoints."""
    if (to == "hybrid") == bool(getattr(checkpoint.args, "hybrid_layer_pattern", None)):
        raise ConversionError(f"{checkpoint.folder}: is that of a {to} model already (--model {to}).")
    if getattr(checkpoint.args, "mtp_num_layers", None):
        raise ConversionError(f"{checkpoint.folder}: layers of multi-token prediction are not converted.")
    if to == "gpt":
        args = as_gpt(checkpoint.args, checkpoint.folder)
        return args, Names(args.num_layers, isinstance(args.moe_layer_freq, int), to)
    is_stacked = not any((match := LAYER.fullmatch(key)) and match["number"] for key in stored)
    return as_hybrid(checkpoint.args), Names(checkpoint.args.num_layers, is_stacked, to)


def _check_optimizer(checkpoint: Checkpoint) -> None:
    kind = checkpoint.layout.get("distrib_optim_sharding_type")
    if getattr(checkpoint.args, "use_distributed_optimizer", False) and kind not in RESHARDABLE:
        raise ConversionError(
            f"{checkpoint.folder}: the distributed optimizer's state is stored by ranks ({kind}), not by weights. Save "
            "once more with --dist-ckpt-optim-fully-reshardable."
        )
