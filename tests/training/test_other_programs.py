"""Test checkpoints of ReLU routing in programs that do not know it, and checkpoints of version 0.1 in this one."""

from argparse import Namespace
from pathlib import Path

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.remoe import cpu
from megatron.training.arguments import core_transformer_config_from_args
from tests.checkpoints import training
from tests.tiny_model import TOPK
from tests.training_runs import TINY, assert_equal, run, weights
from tools.models.checkpoints import find
from tools.models.megatron_model import SINGLE_PROCESS_SETTINGS

OLD = """
from megatron.remoe import patches
from megatron.remoe.pretrain import main
patches.PATCHES = [patch for patch in patches.PATCHES if patch is not patches.checkpoints.name_relu_routers]
main()
"""


def load_stock_model(run_folder: Path) -> GPTModel:
    """Load a run as lm-eval's megatron_lm backend does: Megatron's own model, built from the arguments it saved."""
    checkpoint = find(run_folder, None)
    # Megatron requires this flag if k is 1.
    args = Namespace(**(vars(checkpoint.args) | SINGLE_PROCESS_SETTINGS | {"moe_router_pre_softmax": True}))
    cpu.adapt_arguments(args)
    config = core_transformer_config_from_args(args)
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    options = {"share_embeddings_and_output_weights": False, "position_embedding_type": "rope"}
    model = GPTModel(config, spec, args.padded_vocab_size, args.seq_length, **options)
    wanted = {"model": model.sharded_state_dict(metadata=checkpoint.layout)}
    model.load_state_dict(dist_checkpointing.load(wanted, str(checkpoint.folder))["model"])
    return model


def test_only_old_checkpoints_load_as_top_k(data: Path, tmp_path: Path, process_groups: None) -> None:
    """Old checkpoints also resume, with the same numbers. The next checkpoint then does not load as top-k."""
    (script := tmp_path / "old.py").write_text(OLD)
    more = ["--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"]
    run(training(data, tmp_path / "old", *more, "--exit-interval", "4"), script=script)
    load_stock_model(tmp_path / "old")  # the fault: a ReMoE becomes a top-k model without an error
    run(training(data, tmp_path / "old", *more))
    run(training(data, tmp_path / "new", *more))
    for name in ("old", "new"):
        with pytest.raises(CheckpointException, match=r"router\.weight from model not in .*router\.relu_weight"):
            load_stock_model(tmp_path / name)
    assert_equal(weights(tmp_path / "old", 6), weights(tmp_path / "new", 6))
    saving = ["--save", str(tmp_path / "top-k"), "--save-interval", "8"]
    run([*TINY, *TOPK, "--data-path", str(data), *saving])
    load_stock_model(tmp_path / "top-k")
