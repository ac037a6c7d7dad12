"""Test the shapes of docs/conversion.md with its flags: train, resume, layouts, export, cost, rehearsal."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron.remoe.files.errors import UsageError
from tests.hf.models import make, megatron_args
from tests.tiny_model import BYTES
from tests.tools.test_cost_command import cost, figures
from tests.training_runs import REPOSITORY, assert_equal, run, series, step_losses, weights
from tools.models import export as export_hf
from tools.models.megatron_model import build
from tools.plan import rehearse

pytestmark = [pytest.mark.usefixtures("process_groups"), pytest.mark.filterwarnings("ignore")]
PAGE = (REPOSITORY / "docs" / "conversion.md").read_text().partition("## Shapes of public models")[2]
SHAPES = dict(re.findall(r'^(\w+)="(.+)"$', PAGE.split("```bash")[1], re.MULTILINE))
COMMON = [SHAPES.pop(name) for name in ("model", "experts", "training")]
PLAIN = re.findall('^plain="(.+)"$', PAGE, re.MULTILINE)[0].split()
PARAMETERS = ("embedding.", "decoder.", "output_layer.")
SAVED, END = 2, 4
LAYOUTS = {
    "TP2 + SP + EP2": "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2"
    " --expert-tensor-parallel-size 1",
    "PP2": "--pipeline-model-parallel-size 2",
}


@dataclass(frozen=True)
class Run:
    """A training run of a shape: its flags, what it printed, and its checkpoints."""

    flags: list[str]
    printed: str
    folder: Path


@pytest.fixture(scope="module", params=SHAPES)
def trained(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp(request.param)
    # Large initial weights: with small ones, attention is nearly uniform, and an error in its gradients hardly shows.
    more = "--make-vocab-size-divisible-by 192 --split 90,10,0 --moe-relu-l1-reg-coeff-init 1e-3 --init-method-std 0.2"
    more += " --global-batch-size 8 --micro-batch-size 4"
    words = " ".join([*COMMON, SHAPES[request.param], more]).split()
    flags = [*words, *BYTES, "--data-path", str(data)]
    printed = run([*flags, "--save", str(folder), "--save-interval", str(SAVED)])
    return Run(flags, printed, folder)


def resumed(trained: Run, *more: str, processes: int = 1) -> str:
    return run([*trained.flags, "--load", str(trained.folder), "--ckpt-step", str(SAVED), *more], processes)


def test_resumes_bit_for_bit(trained: Run, tmp_path: Path) -> None:
    resumed(trained, "--save", str(tmp_path), "--save-interval", str(END))
    assert_equal(weights(tmp_path, END), weights(trained.folder, END))


@pytest.mark.parametrize("layout", ["TP2 + SP + EP2", pytest.param("PP2", marks=pytest.mark.bulk)])
def test_layouts_train_like_one_process(trained: Run, layout: str) -> None:
    output = resumed(trained, *LAYOUTS[layout].split(), processes=2)
    assert step_losses(output) == pytest.approx(step_losses(trained.printed)[SAVED:], rel=1e-4)
    for field, relative in (("grad norm", 5e-4), ("sparsity", 1e-3), ("l1 coefficient", 0)):
        assert series(output, field) == pytest.approx(series(trained.printed, field)[SAVED:], rel=relative), field


def test_latent_attention_needs_transformer_engine() -> None:
    args = megatron_args(make("relu").config)
    args.multi_latent_attention = True
    with pytest.raises(UsageError, match="--multi-latent-attention"):
        build(args)


def test_exports_and_comes_back(trained: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Both directions compare logits within 1e-4. The exported model generates the same text with and without cache."""
    there, back = tmp_path / "there", tmp_path / "back"
    assert export_hf.main(["--load", str(trained.folder), "--save", str(there)]) == 0, capfd.readouterr().err
    model = AutoModelForCausalLM.from_pretrained(there)
    assert model.config.router_aux_loss_coef == pytest.approx(1e-3 * 1.2**END)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    ids = torch.arange(16).view(2, -1)
    assert torch.equal(model.generate(ids, **settings), model.generate(ids, use_cache=False, **settings))
    assert export_hf.main(["--reverse", "--load", str(there), "--save", str(back)]) == 0, capfd.readouterr().err


def test_cost_counts_the_parameters(trained: Run) -> None:
    stored = weights(trained.folder, END)
    sizes = [one.numel() for name, one in stored.items() if name.startswith(PARAMETERS) and one.is_floating_point()]
    assert figures(cost("--gpus", "1", "--", *trained.flags), "total parameters") == [sum(sizes)]


@pytest.mark.skipif(torch.version.cuda is None, reason="PyTorch is built for CPUs alone, and CUDA is what is played")
def test_starts_in_a_rehearsal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One shape starts in a rehearsal; the others were rehearsed by hand.

    Nothing is saved. A layer waits once for each number of chunks that it tries; its chunks do not wait.
    """
    flags = " ".join([*COMMON, SHAPES["qwen3_moe"]]).split()
    results = tmp_path / "results.json"
    flags += ["--save", str(tmp_path / "run"), "--save-interval", "1", "--global-batch-size", "2"]
    options = ["--gpus", "1", "--stage", "dense", "--json", str(results)]
    assert rehearse.main([*options, "--", *flags, *PLAIN, *BYTES]) == 0
    record = json.loads(results.read_text())
    assert record["starts"] and set(record["stages"]) == {"dense"} and not (tmp_path / "run").exists()
    assert 1 <= sum(times for where, times in record["host_syncs"].items() if "remoe/layer/" in where) <= 3
    assert all(line.startswith("rehearsal:") for line in capsys.readouterr().err.splitlines())
