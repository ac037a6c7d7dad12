"""Test docs/layer_targets.py: each layer's λ follows the layer's own sparsity."""

from pathlib import Path

import pytest
import torch

from megatron.remoe.training.run_log import read_run_log
from tests.tiny_model import RELU
from tests.trainings import REPOSITORY, TINY, run
from tools.models.checkpoints import find, read_parts


def test_each_layer_has_its_own_coefficient(data: Path, tmp_path: Path) -> None:
    words = [*TINY, *RELU, "--data-path", str(data), "--save", str(tmp_path)]
    words += "--moe-relu-l1-reg-coeff-init 1e-3 --lr 1e-3 --train-iters 24 --save-interval 24".split()
    run(words, script=REPOSITORY / "docs" / "layer_targets.py")
    lines = [line for line in read_run_log(tmp_path / "metrics.jsonl") if line["kind"] == "log"]
    assert len(lines) == 24
    checkpoint = find(tmp_path, None)
    keys = sorted(key for key in checkpoint.shapes if key.endswith("router.l1_exponent"))
    stored = {key: torch.zeros(checkpoint.shapes[key], dtype=torch.int64) for key in keys}
    read_parts(checkpoint.folder, checkpoint.index, {key: (tensor, None) for key, tensor in stored.items()})
    exponents = torch.cat([tensor.flatten() for tensor in stored.values()]).tolist()
    layers = [[*line["layer_sparsity"].values()] for line in lines]
    expected = [
        sum(
            (line["target_sparsity"] > of[layer]) - (line["target_sparsity"] < of[layer])
            for line, of in zip(lines, layers, strict=True)
        )
        for layer in range(len(exponents))
    ]
    assert exponents == pytest.approx(expected) and len(set(exponents)) > 1
