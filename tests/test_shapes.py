"""The shapes of docs/shapes.md, with the flags of that page, in all uses."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tools.test_cost import cost, figures
from tests.trainings import REPOSITORY, run, series, weights
from tools.common.tiny_model import BYTES
from tools.export_hf import command as export_hf

pytestmark = [pytest.mark.usefixtures("one_thread", "process_groups"), pytest.mark.filterwarnings("ignore")]
PAGE = dict(re.findall(r'^(\w+)="(.+)"$', (REPOSITORY / "docs" / "shapes.md").read_text(), re.MULTILINE))
COMMON = [PAGE.pop(name) for name in ("model", "experts", "training")]
SAVED, END = 2, 4
LAYOUTS = {
    "TP2 + SP + EP2": "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2"
    " --expert-tensor-parallel-size 1",
    "PP2": "--pipeline-model-parallel-size 2",
}


@dataclass(frozen=True)
class Run:
    """A training of a shape: its flags, what it printed, and its checkpoints."""

    flags: list[str]
    printed: str
    folder: Path


@pytest.fixture(scope="module", params=PAGE)
def trained(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp(request.param)
    flags = [*" ".join([*COMMON, PAGE[request.param]]).split(), *BYTES, "--make-vocab-size-divisible-by", "192"]
    flags += ["--data-path", str(data), "--split", "90,10,0", "--moe-relu-l1-reg-coeff-init", "1e-3"]
    printed = run([*flags, "--save", str(folder), "--save-interval", str(SAVED)])
    return Run(flags, printed, folder)


def resumed(trained: Run, *more: str, processes: int = 1) -> str:
    return run([*trained.flags, "--load", str(trained.folder), "--ckpt-step", str(SAVED), *more], processes)


def test_resumes_bit_for_bit(trained: Run, tmp_path: Path) -> None:
    resumed(trained, "--save", str(tmp_path), "--save-interval", str(END))
    expected, found = weights(trained.folder, END), weights(tmp_path, END)
    assert expected.keys() == found.keys()
    assert [key for key, tensor in expected.items() if not torch.equal(tensor, found[key])] == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_train_like_one_process(trained: Run, layout: str) -> None:
    output = resumed(trained, *LAYOUTS[layout].split(), processes=2)
    # The second line after a start has the mean loss of both steps.
    losses, expected = series(output, "lm loss"), series(trained.printed, "lm loss")[SAVED:]
    expected[1] = (expected[0] + expected[1]) / 2
    assert losses == pytest.approx(expected, rel=1e-4)
    for field, relative, absolute in (("grad norm", 1e-4, 1e-3), ("sparsity", 0, 1e-3), ("l1 coefficient", 0, 0)):
        expected = series(trained.printed, field)[SAVED:]
        assert series(output, field) == pytest.approx(expected, rel=relative, abs=absolute), field


def test_exports_and_comes_back(trained: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The folder has the logits of training, and the checkpoint made of it its weights."""
    there, back = tmp_path / "there", tmp_path / "back"
    assert (
        export_hf.main(
            [
                "--load",
                str(trained.folder),
                "--save",
                str(there),
                "--data-path",
                trained.flags[trained.flags.index("--data-path") + 1],
            ]
        )
        == 0
    )
    assert float(capfd.readouterr().out.split("largest difference of logits ")[1].split()[0]) < 1e-4
    model = AutoModelForCausalLM.from_pretrained(there)
    ids = torch.arange(8).view(1, -1)
    with torch.no_grad():
        cached = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert torch.equal(
            cached, model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=False)
        )
    assert export_hf.main(["--reverse", "--load", str(there), "--save", str(back)]) == 0


def test_costs_are_the_models(trained: Run) -> None:
    keys = {
        key: tensor
        for key, tensor in weights(trained.folder, END).items()
        if key.startswith(("embedding", "decoder", "output_layer")) and tensor.is_floating_point()
    }
    output = cost("--gpus", "1", "--", *trained.flags)
    assert figures(output, "total parameters") == [sum(tensor.numel() for tensor in keys.values())]
