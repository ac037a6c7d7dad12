"""Test which settings must equal those of the checkpoint that a run resumes from."""

import sys
from dataclasses import fields

import pytest

from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.remoe.files.errors import UsageError
from megatron.remoe.routing.config import ReMoEMLAConfig
from megatron.remoe.start import saved_settings
from megatron.remoe.start.saved_settings import SAME_RESULT, differences, result_settings, schedule_settings
from megatron.remoe.training import arguments
from tests.tiny_model import RELU
from tests.training_runs import TINY

COMPARED = {
    "--hidden-size 128": "--hidden-size 64 in the checkpoint, 128 here",
    "--moe-granularity 2": "--moe-granularity 1 in the checkpoint, 2 here",
    "--moe-router-topk 2": "--moe-router-topk 1 in the checkpoint, 2 here",
    "--multi-latent-attention --rotary-scaling-factor 40": "--rotary-scaling-factor 1.0 in the checkpoint, 40.0 here",
    "--moe-relu-l1-reg-coeff-multiplier 1.5": "1.2 in the checkpoint, 1.5 here",
    "--moe-relu-normalize": "--moe-relu-normalize False in the checkpoint, (on) here",
    "--moe-relu-sparsity-scope layer": "--moe-relu-sparsity-scope model in the checkpoint, layer here",
    "--rotary-interleaved": "--rotary-interleaved False in the checkpoint, (on) here",
    "--split 80,20,0": "--split 90,10,0 in the checkpoint, 80,20,0 here",
    "--data-path 1 here/text 1.0 other": "--data-path text in the checkpoint, 1.0 text 1.0 other here",
    "--adam-beta2 0.95": "--adam-beta2 0.999 in the checkpoint, 0.95 here",
    "--seed 7": "--seed 1234 in the checkpoint, 7 here",
    "--bf16": "--bf16 False in the checkpoint, (on) here",
    "--global-batch-size 16": "--global-batch-size 8 in the checkpoint, 16 here",
    "--te-rng-tracker": "--te-rng-tracker False in the checkpoint, (on) here",
    "--use-distributed-optimizer": "--use-distributed-optimizer False in the checkpoint, (on) here",
}
FREE = """--micro-batch-size 2|--num-workers 7|--log-interval 7|--eval-interval 7|--save elsewhere|--data-path here/text
--recompute-granularity full --recompute-method uniform --recompute-num-layers 1|--moe-token-dispatcher-type allgather
--tensor-model-parallel-size 2 --sequence-parallel|--pipeline-model-parallel-size 2|--expert-model-parallel-size 2
--overlap-grad-reduce --overlap-param-gather|--transformer-impl transformer_engine|--moe-relu-activation-limit 4
--no-bias-swiglu-fusion|--lr-decay-style linear|--train-iters 99|--hybrid-layer-pattern *E*E"""


@pytest.fixture
def changed(monkeypatch: pytest.MonkeyPatch):
    def compare(flags: str) -> str:
        """Return the differences between the tiny model's settings with and without the flags."""
        parsed = []
        for more in ("--data-path there/text", f"--data-path there/text {flags}"):
            monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *TINY, *RELU, *more.split()])
            parsed.append(arguments.parse_args())
        return differences(parsed[1], parsed[0], result_settings("--multi-latent-attention" in flags))

    return compare


@pytest.mark.parametrize("flags", COMPARED)
def test_settings_of_the_result_count(flags: str, changed) -> None:
    assert COMPARED[flags] in changed(flags)


@pytest.mark.parametrize("flags", FREE.replace("\n", "|").split("|"))
def test_settings_of_speed_layout_and_output_are_free(flags: str, changed) -> None:
    assert changed(flags) == ""


def test_the_schedule_is_compared_by_itself() -> None:
    assert "moe_relu_routing" in result_settings(False)
    assert {"lr_warmup_iters", "lr_decay_style", "weight_decay"} <= schedule_settings() - result_settings(False)


# Megatron's settings per group. If this fails, put each new setting that does not change results into `SAME_RESULT`.
SETTINGS = {"model": 271, "optimizer": 57, "rng": 4, "network size": 29, "moe": 6, "data and dataloader": 41}


def test_new_settings_of_megatron_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = saved_settings.setting_groups(is_latent=True)
    added = {field.name for field in fields(ReMoEMLAConfig)} - {field.name for field in fields(MLATransformerConfig)}
    assert {title: len(names - added) for title, names in groups.items()} == SETTINGS
    assert [name for title, names in SAME_RESULT.items() for name in names.split() if name not in groups[title]] == []
    monkeypatch.setattr(saved_settings, "FLAG_GROUPS", ("network size", "renamed"))
    with pytest.raises(UsageError, match="renamed"):
        result_settings(False)
