"""Configure pytest. Layers are tested in one process, on the GPU if there is one; training runs test the layouts."""

import functools
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron.remoe import cpu
from megatron.remoe.start import unhelpful_warnings
from tests.data_sets import real_text, write_documents

unhelpful_warnings.hide_unhelpful_warnings()
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel's module is imported
    # Tests run in parallel, so more threads would mostly wait, here and in the processes that tests start.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
if cpu.is_wanted([]):
    cpu.install()
# Started with `nohup ... &`, this process ignores SIGINT, and so would those that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# The slowest test files, the slowest first. They start first, so that none is left to run when all others are done.
LONG = """
test_rehearse test_quickstart test_training test_parity test_experiments_training test_shapes test_conversion
test_hybrid test_checkpoints test_resharding test_finetuning test_export test_golden test_rehearsed
test_faults test_launch_training test_run_lock test_megatron_changes test_wheel test_evaluate test_report
test_preprocess
""".split()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("remoe")
    group.addoption("--update-golden", action="store_true", help="renew the committed figures of tests/golden")
    text = "train every layout in every variant in FOLDER, and write the table of docs/parallelism.md"
    group.addoption("--parity-tables", type=Path, metavar="FOLDER", help=text)
    text = "with -m servers: the interpreter of an environment with vLLM (default: make one)"
    group.addoption("--vllm-python", metavar="PYTHON", help=text)
    text = "with -m gpu: write the figures of each test to FOLDER, and leave out tests whose figures are there"
    group.addoption("--gpu-report", type=Path, metavar="FOLDER", help=text)


# Folders and files that take seconds; `scripts/test.sh --fast` runs only these. All others start runs or tools.
FAST = """
tools/test_common.py tools/test_corpus.py tools/test_encoding.py tools/test_run_figures.py
files kernels/test_values.py layer/test_grouped_swiglu.py
layer/test_moe_layer.py layer/test_bounded_memory.py layer/test_host_syncs.py
start/test_data.py start/test_messages.py start/test_saved_settings.py routing
scripts/test_launch_commands.py test_rooms.py test_static_checks.py training/test_arguments.py
tools/test_rehearse_command.py hf/test_modeling.py tools/test_fitting.py
tools/test_experiments.py tools/test_published.py tools/test_results.py tools/test_significance.py
test_patches.py test_checkpoint_patches.py start/test_machine.py scripts/test_launch.py scripts/test_fork.py
tools/test_flops.py tools/test_cost.py training/test_hooks.py baselines/test_routers.py
layer/test_upstream.py scripts/test_cluster.py scripts/test_slurm.py
training/test_tokenizer.py layer/test_transformer_engine.py
""".split()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark slow tests, and put long files first; pytest-xdist keeps this order with --no-loadscope-reorder."""
    folder = Path(__file__).parent
    for item in items:
        if not any(item.path.is_relative_to(folder / fast) for fast in FAST):
            item.add_marker("slow")
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    if (megatron := sys.modules.get("megatron.training.argument_utils")) is not None:
        # Megatron's parser reads its help texts from the sources of 40 classes; here 300 parsers read them once.
        factory, read = megatron.ArgumentGroupFactory, megatron.ArgumentGroupFactory._get_field_docstrings
        factory._get_field_docstrings = staticmethod(functools.cache(functools.partial(read, factory)))


@pytest.fixture(scope="session")
def process_groups() -> Iterator[None]:
    """Create Megatron's process groups for a world of one process."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from tools.models.megatron_model import one_process

    with one_process(backend="nccl" if torch.cuda.is_available() else "gloo"):
        # Megatron sets this when it starts. The first value decides the shape of all later ones.
        MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1, device="cuda" if torch.cuda.is_available() else "cpu"))
        yield


@pytest.fixture(autouse=True)
def fresh_metrics() -> Iterator[None]:
    """Delete Megatron's table of losses by layer: it keeps the length that it got from the first model."""
    yield
    if (logging := sys.modules.get("megatron.core.transformer.moe.moe_logging")) is not None:
        logging.destroy_moe_metrics_tracker()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a small Megatron data set of real text, and return its prefix."""
    prefix = tmp_path_factory.mktemp("data") / "stdlib"
    write_documents(prefix, real_text())
    return prefix
