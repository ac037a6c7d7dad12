"""Convert a GPTModel's checkpoint to a HybridModel's or back, optimizer state included.

A GPTModel's layer has attention and MLP, a HybridModel's only one of them. Weights, optimizer state and λ are the same
numbers under other names, so stored pieces are copied one by one.
"""

import argparse
import io
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron.remoe.preflight.checkpoint_files import CONFIG, RELEASE, TRACKER, read_index
from megatron.remoe.preflight.checkpoint_fit import common_state

from ..common.checkpoints import Checkpoint, check_output, find, new_folder
from ..common.display import Display
from ..common.errors import ConversionError
from ..common.hybrid import FINAL_NORM, as_gpt, as_hybrid, hybrid_layer

# With these the optimizer's state is stored under the weights' names.
RESHARDABLE = ("fully_reshardable", "fully_sharded_model_space")
LAYER = re.compile(r"(?P<before>(?:.*\.)?decoder\.layers\.)(?:(?P<number>\d+)\.)?(?P<rest>.+)")
OBJECT = re.compile(r"(?P<key>.+)/shard_(?P<offset>[\d.]+)_(?P<shape>[\d.]+)")
# An empty object that GPTModel does not have.
ONLY_HYBRID = "output_layer._extra_state"

type Place = tuple[int, ...]


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
        of = "gpt" if self.to == "hybrid" else "hybrid"
        return key.replace(FINAL_NORM[of], FINAL_NORM[self.to])

    def _numbered(self, match: re.Match[str], number: int) -> str:
        return f"{match['before']}{number}.{match['rest']}"


def convert_class(options: argparse.Namespace, display: Display) -> None:
    """Write the checkpoint under `options.load` for the other class, `options.model`, to `options.save`.

    Raises:
        ConversionError: it is of that class already, the other one cannot express its layers, or it cannot be read
            or written.
    """
    check_output(options.save)
    checkpoint = find(options.load, options.ckpt_step)
    index = read_index(checkpoint.folder)
    state = common_state(checkpoint.folder)
    args, names = _target(checkpoint, options.model, index.state_dict_metadata)
    _check_optimizer(checkpoint)
    size = sum(file.stat().st_size for file in checkpoint.folder.iterdir())
    with new_folder(options.save, size) as aside:
        folder = aside / checkpoint.folder.name
        folder.mkdir()
        with display.step("copying", len(index.storage_data)):
            _copy(checkpoint.folder, index, folder, names, state | {"args": args}, display)
        shutil.copyfile(checkpoint.folder / CONFIG, folder / CONFIG)
        tracked = RELEASE if folder.name == RELEASE else str(int(folder.name.removeprefix("iter_")))
        (aside / TRACKER).write_text(tracked, encoding="utf-8")
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


class _Writer:
    """Write one file of a torch_dist checkpoint and its index, piece by piece."""

    def __init__(self, folder: Path, file: BinaryIO) -> None:
        self.folder, self.file = folder, file
        self.stored: dict[str, Any] = {}
        self.places: dict[MetadataIndex, _StorageInfo] = {}

    def add_object(self, key: str, content: bytes) -> None:
        self.stored[key] = BytesStorageMetadata()
        self._write(MetadataIndex(key), content)

    def add_tensor(self, key: str, whole: TensorStorageMetadata, chunk: ChunkStorageMetadata, content: bytes) -> None:
        self.stored.setdefault(key, whole).chunks.append(chunk)
        self._write(MetadataIndex(key, chunk.offsets), content)

    def write_index(self) -> None:
        index = Metadata(self.stored, planner_data=None, storage_data=self.places)
        (self.folder / ".metadata").write_bytes(pickle.dumps(index))

    def _write(self, piece: MetadataIndex, content: bytes) -> None:
        name = Path(self.file.name).name
        self.places[piece] = _StorageInfo(relative_path=name, offset=self.file.tell(), length=len(content))
        self.file.write(content)


def _copy(source: Path, index: Metadata, target: Path, names: Names, state: dict[str, Any], display: Display) -> None:
    """Copy piece by piece, in the order of the files."""
    pieces = sorted(index.storage_data.items(), key=lambda item: (item[1].relative_path, item[1].offset))
    with (target / "__0_0.distcp").open("wb") as file:
        writer = _Writer(target, file)
        for piece, place in pieces:
            with (source / place.relative_path).open("rb") as stream:
                stream.seek(place.offset)
                content = stream.read(place.length)
            whole = index.state_dict_metadata[piece.fqn]
            if isinstance(whole, TensorStorageMetadata):
                _copy_tensor(piece, whole, content, names, writer)
            elif piece.fqn.startswith("common_state/"):
                writer.add_object(piece.fqn, _saved([state]))
            elif (key := names.of_object(piece.fqn)) is not None:
                writer.add_object(key, content)
            display.advance(1)
        if names.to == "hybrid":
            writer.add_object(f"{ONLY_HYBRID}/shard_0_1", _saved([None]))
        writer.write_index()
    if (source / "common.pt").is_file():
        torch.save(state, target / "common.pt")


def _copy_tensor(
    piece: MetadataIndex, whole: TensorStorageMetadata, content: bytes, names: Names, writer: _Writer
) -> None:
    shape, offset = tuple(whole.size), tuple(piece.offset or ())
    key, new_shape, new_offset = names.of_tensor(piece.fqn, shape, offset)
    sizes = next(tuple(chunk.sizes) for chunk in whole.chunks if tuple(chunk.offsets) == offset)
    if len(new_shape) != len(shape):
        sizes = sizes[1:] if len(new_shape) < len(shape) else (1, *sizes)
        content = _saved(torch.load(io.BytesIO(content), weights_only=True).reshape(sizes))
    chunk = ChunkStorageMetadata(torch.Size(new_offset), torch.Size(sizes))
    writer.add_tensor(key, replace(whole, size=torch.Size(new_shape), chunks=[]), chunk, content)


def _saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()
