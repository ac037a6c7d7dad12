"""Test multi-token prediction: the routers of its layers work like all others, in both model classes."""

from pathlib import Path
from typing import Any

import pytest

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.remoe.layer.layer import ReMoELayer
from megatron.remoe.routing.controller import SparsityController
from megatron.remoe.routing.router import ReLURouter
from megatron.remoe.training import layer_changes
from megatron.remoe.training.local_layers import install_local_layers
from megatron.remoe.training.pairs import PairCounter
from megatron.remoe.training.routing_hooks import install_routing
from megatron.remoe.transformer.attention import FusedDotProductAttention
from megatron.training.models.base import compose_hooks
from megatron.training.models.gpt import GPTModelConfig
from megatron.training.models.hybrid import HybridModelConfig
from tests.layers import make_config
from tests.tiny_model import RELU
from tests.training_runs import TINY, last_error, records, run
from tools.models.export import main as export
from tools.recipes.megatron_values import make_parser

FLAGS = "--moe-relu-routing --transformer-impl local --num-experts 4 --disable-bias-linear --log-interval 1"
ARGS = make_parser().parse_args(FLAGS.split())
ARGS.iteration = 0


def built(model_cfg: GPTModelConfig | HybridModelConfig) -> Any:
    """Build the model with this project's routing and local layers, before it is wrapped."""
    install_routing(ARGS, model_cfg)
    install_local_layers(ARGS, model_cfg)
    model = model_cfg.get_builder_cls()(model_cfg).build_model(ProcessGroupCollection.use_mpu_process_groups())
    (model,) = compose_hooks(model_cfg.pre_wrap_hooks)([model])
    return model


def make_settings(num_layers: int, **changes: Any) -> dict[str, Any]:
    settings = {"mtp_num_layers": 2, "normalization": "RMSNorm", "transformer_impl": "local"} | changes
    config = make_config(num_layers=num_layers, **settings)
    return {"transformer": config, "vocab_size": 128, "position_embedding_type": "rope"}


@pytest.mark.usefixtures("process_groups")
def test_megatron_still_specifies_the_layers_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron builds MTP layers with its own router, so hooks rebuild them. If this fails, remove the rebuilding."""
    settings = make_settings(2)
    monkeypatch.setattr(layer_changes, "rebuild_prediction_layers", lambda _change, chunks: chunks)
    stock: GPTModel = built(GPTModelConfig(**settings))
    assert [type(layer.mtp_model_layer.mlp.router) for layer in stock.mtp.layers] == [TopKRouter] * 2
    monkeypatch.undo()
    model: GPTModel = built(GPTModelConfig(**settings))
    for layer, decoder_layer in zip(model.mtp.layers, model.decoder.layers, strict=True):
        layer = layer.mtp_model_layer
        assert type(layer.mlp) is ReMoELayer and type(layer.mlp.router) is ReLURouter
        assert type(layer.mlp.experts) is type(decoder_layer.mlp.experts)
        assert type(layer.self_attention.core_attention) is FusedDotProductAttention
    assert model.state_dict().keys() >= {f"mtp.layers.{n}.mtp_model_layer.mlp.router.l1_exponent" for n in (0, 1)}


@pytest.mark.usefixtures("process_groups")
@pytest.mark.parametrize("pattern", [None, "*E*E/*E/*E", "*E/EEE"])
def test_each_router_has_a_row_of_its_own(pattern: str | None) -> None:
    """In a hybrid, Megatron numbers layers from 1 at each depth, and routers do not know that they belong to MTP."""
    if pattern is not None:
        num_layers, depths = pattern.index("/"), pattern.count("/")
        settings = make_settings(num_layers, is_hybrid_model=True, mtp_num_layers=depths)
        model = built(HybridModelConfig(**settings, hybrid_layer_pattern=pattern))
        layers = [2, 4, 5, 6] if depths == 2 else [2, 3, 4, 5]
    else:
        settings, layers = make_settings(2), [1, 2, 3, 4]
        model = built(GPTModelConfig(**settings))
    controller, counter = SparsityController([model], settings["transformer"]), PairCounter([model])
    for router, pairs in zip(controller.routers, (1, 2, 3, 4), strict=True):
        router.weight.data.fill_(-1.0)[:pairs] = 1.0
        router(router.weight.new_ones(5, 1, router.weight.shape[1]))
    controller.update()
    summary = controller.summary()
    assert summary is not None
    assert summary.layer_sparsity == dict(zip(layers, (0.75, 0.5, 0.25, 0.0), strict=True))
    assert summary.sparsity == 0.375, "those of multi-token prediction among them"
    assert summary.l1_loss == sum(summary.layer_l1_loss.values()) == 64 * (1 + 2 + 3 + 4), "each gate is 16, each f_e 4"
    assert [int(router.l1_exponent) for router in controller.routers] == [1] * 4
    counter.update()
    loads = counter.tokens_per_expert()
    assert [sum(layer) for layer in loads.values()] == [1, 2, 3, 4] and list(loads) == layers


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("process_groups")
def test_training_goes_on_in_another_layout(data: Path, tmp_path: Path) -> None:
    """With PP2, the last stage needs tokens too, and the first knows the MTP layers only from the reduced counts.

    The last stage has the MTP layers, also with --pipeline-model-parallel-layout.
    """

    def train(*arguments: str, processes: int = 1) -> dict[int, dict[str, str]]:
        saving = ["--save", str(tmp_path / str(processes)), "--save-interval", "3", "--train-iters", "4"]
        more = ["--data-path", str(data), *RELU, "--mtp-num-layers", "2", *saving, *arguments]
        return records(run([*TINY, *more], processes))

    whole = train()
    names = ("lm loss", "mtp_1 loss", "mtp_2 loss", "sparsity", "l1 coefficient", "l1 loss", "grad norm")
    stages = ["--pipeline-model-parallel-size", "2", "--load", str(tmp_path / "1"), "--ckpt-step", "3"]
    for layout in ([], ["--pipeline-model-parallel-layout", "Et|tmmL"]):
        parts = train(*stages, *layout, "--save", str(tmp_path / f"run{len(layout)}"), processes=2)
        assert list(parts) == [4]
        for name in names:
            assert float(parts[4][name]) == pytest.approx(float(whole[4][name]), rel=1e-4), name
    # The export fails unless the logits in transformers equal those of Megatron, whose model has these layers.
    assert export(["--load", str(tmp_path / "1"), "--save", str(tmp_path / "folder")]) == 0


def test_prediction_before_the_last_stage_is_refused(data: Path) -> None:
    """Stages between the first and the last do not read tokens. This is refused for every routing."""
    stages = "--mtp-num-layers 1 --pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Ettm|L".split()
    assert "REMOE-E203" in last_error(run([*TINY, "--data-path", str(data), *stages], 2, expect=2))
