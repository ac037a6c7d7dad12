"""Test how flips are counted. test_training.py tests flips in layouts, and that measuring them changes nothing."""

import argparse

import pytest
import torch

from megatron.core import mpu
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
from megatron.remoe.training.flips import FlipMeter, _evaluation_state
from tests.layers import HIDDEN, make_config, make_layer, make_topk_config


class Model(torch.nn.Module):
    """A model of one MoE layer, with the interface that Megatron's schedules need."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer, self.decoder = layer, torch.nn.Module()
        self.decoder.layers = torch.nn.ModuleList([layer])
        self.config = layer.config

    def set_input_tensor(self, _inputs: object) -> None: ...

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        output, _ = self.layer(tokens.transpose(0, 1).contiguous())
        return output


@pytest.mark.usefixtures("process_groups")
def test_random_routing_draws_the_same_and_leaves_no_trace() -> None:
    model, tracker = Model(make_layer(make_config())), get_cuda_rng_tracker()
    before, drawn = {name: state.clone() for name, state in tracker.get_states().items()}, []
    for _ in range(2):
        with _evaluation_state([model], seed=1), tracker.fork(get_expert_parallel_rng_tracker_name()):
            drawn.append(torch.rand(3, device=model.layer.router.weight.device))
    assert torch.equal(*drawn)
    after = tracker.get_states()
    assert after.keys() == before.keys() and all(torch.equal(after[name], state) for name, state in before.items())


@pytest.mark.usefixtures("process_groups")
@pytest.mark.parametrize("kind", ["relu", "top-k"])
def test_what_an_update_changes_is_counted(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer(make_config() if kind == "relu" else make_topk_config())
    weight, model = layer.router.weight.data, Model(layer)
    weight.zero_()
    weight[0], weight[1] = 1.0, -1.0  # one of the two is active for each token
    args = argparse.Namespace(moe_log_flips_interval=3, eval_micro_batch_size=2, seq_length=5, seed=1)
    args.decoder_seq_length = None
    meter = FlipMeter(args, lambda data, model: (model(next(data)["tokens"]), None))
    meter.chunks = [model]
    sequence = {"tokens": torch.randn(5, HIDDEN, dtype=torch.float64, device=weight.device)}
    meter.calibrate([[sequence] * 3, None])
    numbers = torch.get_rng_state()
    assert meter.after_update(1) is None
    assert meter.after_update(2) is None
    weight[0] *= -1
    weight[1] *= -1
    flips = meter.after_update(3)
    # Replacing one expert by another counts as one changed token.
    assert flips == {"rate": 0.5, "count": 2.0, "layer_rate": {1: 0.5}, "changed_tokens": 1.0}
    assert model.training and torch.equal(torch.get_rng_state(), numbers)
    if kind == "relu":
        assert not layer.router.counts.table.any(), "what is routed here is not counted for the sparsity"

    assert meter.after_update(6) is None, "before the update nothing was looked at, as after a start"
    assert meter.after_update(8) is None
    again = meter.after_update(9)
    assert again is not None and again["rate"] == 0.0
    monkeypatch.setattr(mpu, "get_data_parallel_rank", lambda: 1)
    meter.calibrate([[{"number": number} for number in range(3)], None])
    assert meter._batches[-1]["number"].tolist() == [2, 0], "the second rank's part, from the start again at the end"
