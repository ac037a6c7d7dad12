"""Test multi-token prediction: its layers' routers work like all others, in both model classes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.core.transformer.moe.router import TopKRouter
from megatron.remoe.layer.layer import ReMoELayer
from megatron.remoe.routing.controller import SparsityController
from megatron.remoe.routing.router import ReLURouter
from megatron.remoe.training import hooks
from megatron.remoe.transformer.attention import FusedDotProductAttention
from tests.gpu.runs import FP32_GPU
from tests.tiny_model import RELU
from tests.training_runs import TINY, records, run
from tools.models.export import main as export
from tools.recipes.megatron_values import make_parser


def built(*flags: str) -> Any:
    """Build a tiny ReMoE with two layers of multi-token prediction, for training."""
    args = make_parser().parse_args(
        [*TINY, *RELU, "--num-experts", "4", "--moe-router-load-balancing-type", "none", *FP32_GPU, *flags]
    )
    args.padded_vocab_size, args.params_dtype, args.iteration, args.rank = 384, torch.float32, 0, 0
    return hooks.build_model(args)


@pytest.mark.usefixtures("process_groups")
def test_megatron_still_specifies_the_layers_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron builds MTP layers with its own router, so hooks rebuild them. If this fails, remove the rebuilding."""
    with monkeypatch.context() as unpatched:
        unpatched.setattr(hooks, "rebuild_prediction_layers", lambda _change, chunks: chunks)
        stock = built("--mtp-num-layers", "2")
    assert [type(layer.mtp_model_layer.mlp.router) for layer in stock.mtp.layers] == [TopKRouter] * 2
    model = built("--mtp-num-layers", "2")
    for layer, decoder_layer in zip(model.mtp.layers, model.decoder.layers, strict=True):
        layer = layer.mtp_model_layer
        assert type(layer.mlp) is ReMoELayer and type(layer.mlp.router) is ReLURouter
        assert type(layer.mlp.experts) is type(decoder_layer.mlp.experts)
        assert type(layer.self_attention.core_attention) is FusedDotProductAttention
    assert model.state_dict().keys() >= {f"mtp.layers.{n}.mtp_model_layer.mlp.router.l1_exponent" for n in (0, 1)}


@pytest.mark.usefixtures("process_groups")
@pytest.mark.parametrize(
    ("flags", "layers"),
    [(["--mtp-num-layers", "2"], [1, 2, 3, 4]), (["--hybrid-layer-pattern", "*E*E/*E/*E"], [2, 4, 5, 6])],
    ids=["GPT", "hybrid"],
)
def test_each_router_has_a_row_of_its_own(flags: list[str], layers: list[int]) -> None:
    """In a hybrid, Megatron numbers layers from 1 at each depth, and routers do not know that they belong to MTP."""
    model = built(*flags)
    controller = SparsityController([model], model.config)
    for router, pairs in zip(controller.routers, (1, 2, 3, 4), strict=True):
        router.weight.data.fill_(-1.0)[:pairs] = 1.0
        router(router.weight.new_ones(5, 1, router.weight.shape[1]))
    controller.update()
    summary = controller.summary()
    assert summary is not None
    assert summary.layer_sparsity == dict(zip(layers, (0.75, 0.5, 0.25, 0.0), strict=True))
    assert summary.sparsity == 0.375, "those of multi-token prediction among them"
    assert [int(router.l1_exponent) for router in controller.routers] == [1] * 4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("process_groups")
def test_training_goes_on_in_another_layout(data: Path, tmp_path: Path) -> None:
    """With PP2, the last stage needs tokens too, and the first knows the MTP layers only from the reduced counts."""

    def train(*arguments: str, processes: int = 1) -> dict[int, dict[str, str]]:
        saving = ["--save", str(tmp_path / str(processes)), "--save-interval", "3", "--train-iters", "4"]
        more = ["--data-path", str(data), *RELU, "--mtp-num-layers", "2", *saving, *arguments]
        return records(run([*TINY, *more], processes))

    whole = train()
    parts = train("--pipeline-model-parallel-size", "2", "--load", str(tmp_path / "1"), "--ckpt-step", "3", processes=2)
    assert list(parts) == [4]
    for name in ("lm loss", "mtp_1 loss", "mtp_2 loss", "sparsity", "l1 coefficient", "l1 loss", "grad norm"):
        assert float(parts[4][name]) == pytest.approx(float(whole[4][name]), rel=1e-4), name
    # The export fails unless the logits in transformers equal those of Megatron, whose model has these layers.
    assert export(["--load", str(tmp_path / "1"), "--save", str(tmp_path / "folder")]) == 0
