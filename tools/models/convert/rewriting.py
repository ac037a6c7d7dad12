"""Read the whole content of a torch_dist checkpoint, change its names, and write it again.

The content is held in memory, optimizer state included: name → a tensor, or the bytes of an object.
"""

import io
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem

from megatron.remoe.start.checkpoint_files import CONFIG, RELEASE, TRACKER, stored_object

from ..checkpoints import new_folder, read_tensors, reading

# The name of a weight in a layer; it has no number if the tensor holds the weights of all layers.
LAYER = re.compile(r"(?P<before>(?:.*\.)?decoder\.layers\.)(?:(?P<number>\d+)\.)?(?P<rest>.+)")
OBJECT = re.compile(r"(?P<key>.+)/shard_(?P<offset>[\d.]+)_(?P<shape>[\d.]+)")  # an object is stored in parts

type Content = dict[str, Any]


def read_content(folder: Path, index: Metadata) -> Content:
    """Return the tensors and objects of a checkpoint, without the settings.

    Raises:
        ConversionError: a file is damaged.
    """
    content: Content = {}
    with reading(folder):
        for key, entry in index.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                content[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
            elif isinstance(entry, BytesStorageMetadata) and not key.startswith("common_state/"):
                content[key] = stored_object(folder, index.storage_data[MetadataIndex(key)])
    read_tensors(folder, index, {key: value for key, value in content.items() if torch.is_tensor(value)})
    return content


class _Planner(DefaultSavePlanner):
    """Write the bytes of an object unchanged."""

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        return object if isinstance(object, io.BytesIO) else super().transform_object(write_item, object)


def write_content(content: Content, state: dict[str, Any], output: Path, name: str) -> None:
    """Write a checkpoint. The folder appears only when it is complete.

    Args:
        content: tensors and objects.
        state: Megatron's settings and counters.
        output: new or empty folder.
        name: of the iteration's folder in `output`.

    Raises:
        ConversionError: it cannot be written, for instance because the disk is full.
    """
    with new_folder(output) as aside:
        writer, planner = FileSystemWriter(aside / name), _Planner(flatten_state_dict=False)
        settings = io.BytesIO()
        torch.save([state], settings)  # dcp.save would turn whole numbers among the keys into text
        dcp.save(content | {"common_state/shard_0_1": settings}, storage_writer=writer, planner=planner, no_dist=True)
        (aside / name / CONFIG).write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
        tracked = RELEASE if name == RELEASE else str(int(name.removeprefix("iter_")))
        (aside / TRACKER).write_text(tracked, encoding="utf-8")


def stack_layers(content: Content, layers: int) -> Content:
    """Return the content with the weights of all layers in one tensor, as GPTModel stores layers that are alike."""
    result: Content = {}
    weights: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)
    for key, value in content.items():
        layer = LAYER.fullmatch(key)
        if layer is None or layer["number"] is None:
            result[key] = value
        elif torch.is_tensor(value):
            weights[layer["before"] + layer["rest"]][int(layer["number"])] = value
        elif part := OBJECT.fullmatch(layer["rest"]):
            is_whole = (part["offset"], part["shape"]) == ("0", "1")
            offset, shape = ("", "") if is_whole else (f".{part['offset']}", f".{part['shape']}")
            result[f"{layer['before']}{part['key']}/shard_{layer['number']}{offset}_{layers}{shape}"] = value
    return result | {key: torch.stack([parts[number] for number in range(layers)]) for key, parts in weights.items()}


def split_layers(content: Content) -> Content:
    """Return the content with a tensor for each layer's weight; the inverse of `stack_layers`."""
    result: Content = {}
    for key, value in content.items():
        layer = LAYER.fullmatch(key)
        if layer is None or layer["number"]:
            result[key] = value
        elif torch.is_tensor(value):
            result |= {f"{layer['before']}{number}.{layer['rest']}": part for number, part in enumerate(value)}
        elif part := OBJECT.fullmatch(layer["rest"]):
            (number, _, offset), (_, _, shape) = part["offset"].partition("."), part["shape"].partition(".")
            result[f"{layer['before']}{number}.{part['key']}/shard_{offset or 0}_{shape or 1}"] = value
    return result
