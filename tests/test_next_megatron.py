"""Test what is merged (#7418) or proposed (#6208) for Megatron 0.20, with today's release.

To run it with the sources of #6208 or main: REMOE_TRY_MEGATRON=1 PYTHONPATH=CHECKOUT pytest tests/test_next_megatron.py
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron.remoe.baselines.hash import HashRouter
from megatron.training import global_vars
from tests.entry import Entry, entry_with
from tests.layers import HIDDEN, make_config, make_layer
from tests.tiny_model import RELU
from tests.training_runs import REPOSITORY, TINY, records

BODY = "    set_args(args)\n"
# File of megatron.training → text to replace, and its replacement.
SPLIT = {
    "global_vars.py": (
        BODY,
        f"{BODY}    initialize_runtime_services(args, build_tokenizer)\n\n\n"
        "def initialize_runtime_services(args, build_tokenizer=True):\n",
    ),
    "arguments.py": ("import set_global_variables\n", "import set_args as set_global_variables\n"),
}


@pytest.fixture(scope="module")
def split_entry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Entry]:
    """Start an entry whose Megatron has #7418's split: `parse_and_validate_args` starts no services."""
    folder, installed = tmp_path_factory.mktemp("split"), Path(global_vars.__file__).parent
    shutil.copytree(installed, folder / "megatron" / "training", ignore=shutil.ignore_patterns("__pycache__"))
    for name, (old, new) in SPLIT.items() if not hasattr(global_vars, "initialize_runtime_services") else ():
        file = folder / "megatron" / "training" / name
        text = file.read_text(encoding="utf-8")
        assert text.count(old) == 1
        file.write_text(text.replace(old, new), encoding="utf-8")
    with entry_with(folder) as entry:
        yield entry


@pytest.mark.parametrize("script", ["pretrain_gpt.py", "examples/own_training_script.py"])
def test_services_start_apart_from_parsing(script: str, split_entry: Entry, entry: Entry, data: Path) -> None:
    flags = [*TINY, *RELU, *f"--data-path {data} --train-iters 3 --cpu".split()]
    split, released = (one.run(flags, script=REPOSITORY / script) for one in (split_entry, entry))
    assert released[0] == split[0] == 0, split[1][-3000:]
    assert len(steps := records(released[1])) == 3 and records(split[1]) == steps


def test_cost_starts_services(split_entry: Entry, entry: Entry) -> None:
    command = ["cost", "--gpus", "2", "--", *TINY, *RELU]
    split, released = (one.run(command, script=REPOSITORY / "tools" / "__main__.py") for one in (split_entry, entry))
    assert split == released and released[0] == 0, split[1][-3000:]


@pytest.mark.usefixtures("process_groups")
def test_arguments_of_seqtopk_are_accepted() -> None:
    """#6208 passes `packed_seq_params` to each MoE layer, and `seq_idx` to its router."""
    layer, hidden = make_layer(make_config()), torch.rand(6, 1, HIDDEN, dtype=torch.float64)
    assert torch.equal(layer(hidden, packed_seq_params=None)[0], layer(hidden)[0])
    router = HashRouter(layer.config, pg_collection=layer.router.pg_collection)
    router.set_layer_number(1)
    router.token_ids = torch.arange(6).view(1, 6)
    assert torch.equal(router(hidden, None, seq_idx=None)[1], router(hidden)[1])
