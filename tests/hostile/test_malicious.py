"""Hide code in every file that trainings and tools read: none of it runs, and no prompt asks to run it."""

import contextlib
import io
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.remoe.start.checkpoint_index import INDEX, INDEX_SUM, index_sum
from tests.hostile.conftest import Noted
from tests.hostile.payloads import in_array, in_zip, pickles
from tests.hostile.trials import SAVED, Trial, training
from tests.tools.test_broken_folders import exported, set_field  # noqa: F401
from tests.trainings import run
from tools.models.convert.command import main as convert
from tools.models.evaluate.command import main as evaluate
from tools.models.export.command import main as export
from tools.models.generate.command import main as generate

pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]
BULK = pytest.mark.bulk

PICKLES = [*pickles(Path("/nowhere"))]
NEWEST = f"iter_{SAVED:07d}"


def replace_index(run: Path, content: bytes) -> None:
    (run / NEWEST / INDEX).write_bytes(content)
    (run / NEWEST / INDEX_SUM).write_text(index_sum(run / NEWEST))  # an attacker can write both


def replace_object(prefix: str) -> Callable[[Path, bytes], None]:
    """Return a function that points the index to other bytes for the first object or tensor with a name prefix."""

    def work(run: Path, content: bytes) -> None:
        index = pickle.loads((run / NEWEST / INDEX).read_bytes())
        entry = next(entry for key, entry in index.storage_data.items() if key.fqn.startswith(prefix))
        with (run / NEWEST / entry.relative_path).open("ab") as file:
            entry.offset, entry.length = file.tell(), file.write(in_zip(content))
        replace_index(run, pickle.dumps(index))

    return work


def replace(name: str, change: Callable[[bytes], bytes] = bytes) -> Callable[[Path, bytes], None]:
    def work(run: Path, content: bytes) -> None:
        for path in run.glob(name) if "*" in name else [run / name]:
            path.write_bytes(change(content))

    return work


# Target → function that hides code there; paths are relative to the run's folder.
TARGETS: dict[str, Callable[[Path, bytes], None]] = {
    "index": replace_index,
    "settings": replace_object("common_state/"),
    "random state": replace_object("rng_state"),
    "tensor": replace_object("decoder.layers.mlp.router.weight"),
    "common.pt": replace(f"{NEWEST}/common.pt", in_zip),
}
OTHERS: dict[str, Callable[[Path, bytes], None]] = {
    "shards": replace(f"{NEWEST}/*.distcp", in_zip),
    "last file": replace(f"{NEWEST}/metadata.json"),
    "checksum": replace(f"{NEWEST}/{INDEX_SUM}"),
    "tracker": replace("latest_checkpointed_iteration.txt"),
    "metrics.jsonl": replace("metrics.jsonl", lambda content: b'{"kind": "log", "iteration": 1}\n' + content),
    "holder of the lock": replace("training.lock.holder"),
    "data": replace("../text.bin"),
    "data's index": replace("../text.idx"),
    "index cache": replace("../text/cache/**/*.npy", in_array),
}
CASES = [(target, name) for target in TARGETS for name in PICKLES]
CASES += [(target, name) for target in OTHERS for name in ("os.mkdir", "exec", "through torch")]
# These also run without bulk tests.
SAMPLE = {("index", "through a checkpoint's module"), ("settings", "os.mkdir"), ("random state", "os.mkdir")}


@pytest.mark.parametrize(
    ("target", "name"), [pytest.param(*case, marks=[BULK] * (case not in SAMPLE)) for case in CASES]
)
def test_training_runs_no_code(target: str, name: str, trial: Trial, note: Noted) -> None:
    marker = trial.folder / "executed"
    (TARGETS | OTHERS)[target](trial.run, pickles(marker)[name])
    # With this flag, Megatron reads the settings before it loads the rest.
    result = trial.resume(*["--use-checkpoint-args"] * (target == "settings"))
    assert not marker.exists()
    note("malicious loads", f"{result} (training, {target})", 1)


def test_the_code_would_run(tmp_path: Path) -> None:
    """Each of these pickles makes the folder when plain `pickle.loads` reads it."""
    harmless = []
    for number, name in enumerate(PICKLES):
        marker = tmp_path / str(number)
        with contextlib.suppress(Exception):
            pickle.loads(pickles(marker)[name])
        harmless += [name] * (not marker.exists())
    assert harmless == []


@BULK
@pytest.mark.parametrize("name", PICKLES)
def test_one_file_per_rank_runs_no_code(name: str, whole: Path, tmp_path: Path, note: Noted) -> None:
    folder, marker = whole / "one_file", tmp_path / "executed"
    flags = ["--ckpt-format", "torch"]
    if not folder.exists():
        run([*training(whole, folder.name, *flags), "--exit-interval", str(SAVED)])
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / NEWEST / "mp_rank_00" / "model_optim_rng.pt").write_bytes(in_zip(pickles(marker)[name]))
    for file in ("text.bin", "text.idx"):
        shutil.copy(whole / file, tmp_path)
    result = Trial(tmp_path, whole / "expected", 0).resume_anyhow(*flags)
    assert not marker.exists()
    note("malicious loads", f"{result} (training, one file per rank)", 1)


@pytest.fixture
def no_answer(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Replace standard input by answers of yes that no tool should read."""
    answers = io.StringIO("y\ny\ny\n")
    monkeypatch.setattr(sys, "stdin", answers)
    return answers


@BULK
@pytest.mark.parametrize("name", PICKLES)
@pytest.mark.parametrize("target", TARGETS)
def test_tools_run_no_code(
    target: str, name: str, trial: Trial, note: Noted, no_answer: io.StringIO, capfd: pytest.CaptureFixture[str]
) -> None:
    """Tools that read a run's checkpoint execute no code in it."""
    marker, out = trial.folder / "executed", str(trial.folder / "out")
    TARGETS[target](trial.run, pickles(marker)[name])
    load = ["--load", str(trial.run)]
    codes = [
        convert([*load, "--save", out, "--num-experts", "4"]),
        export([*load, "--save", out]),
        generate([*load, "--prompt", "a", "--max-new-tokens", "1"]),
        evaluate([*load, "--data-path", str(trial.folder / "text"), "--sequences", "2"]),
    ]
    output, error = capfd.readouterr()
    assert not marker.exists() and "Traceback" not in error and "[y/N]" not in output + error, error
    assert no_answer.tell() == 0 and set(codes) <= {0, 1, 2}
    note("malicious loads", f"{'read' if 0 in codes else 'refused'} (tools, {target})", len(codes))


def hide(name: str) -> Callable[[Path, bytes], None]:
    return lambda folder, content: (folder / name).write_bytes(content)


def as_code(folder: Path, content: bytes) -> None:
    """Write code next to the weights, and name it in the configurations of model and tokenizer."""
    line = f"__import__('pickle').loads({content!r})\n"
    for name in ("modeling_remoe.py", "configuration_remoe.py", "tokenization.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(line)
    set_field(folder, "auto_map", {"AutoConfig": "configuration_remoe.RemoeConfig", "AutoModel": "modeling_remoe.R"})
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["tokenization.Tokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def instead_of_weights(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(in_zip(content))


def as_adapter(folder: Path, content: bytes) -> None:
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.bin").write_bytes(content)


EXPORTED: dict[str, Callable[[Path, bytes], None]] = {
    "weights": hide("model.safetensors"),
    "pickle beside the weights": lambda folder, content: hide("pytorch_model.bin")(folder, in_zip(content)),
    "pickle instead of the weights": instead_of_weights,
    "adapter": as_adapter,
    "code": as_code,
    "configuration": hide("config.json"),
    "tokenizer": hide("tokenizer.json"),
    "generation": hide("generation_config.json"),
}


@BULK
@pytest.mark.usefixtures("process_groups")
@pytest.mark.parametrize("name", PICKLES)
@pytest.mark.parametrize("target", EXPORTED)
def test_exported_folders_run_no_code(
    target: str,
    name: str,
    exported: Path,  # noqa: F811
    tmp_path: Path,
    note: Noted,
    no_answer: io.StringIO,
    capfd: pytest.CaptureFixture[str],
) -> None:
    marker, folder = tmp_path / "executed", Path(shutil.copytree(exported, tmp_path / "model"))
    EXPORTED[target](folder, pickles(marker)[name])
    codes = [
        generate(["--load", str(folder), "--prompt", "a", "--max-new-tokens", "1"]),
        evaluate(["--load", str(folder), "--data-path", "/nowhere"]),
        export(["--reverse", "--load", str(folder), "--save", str(tmp_path / "out")]),
    ]
    output, error = capfd.readouterr()
    assert not marker.exists() and "Traceback" not in error and "[y/N]" not in output + error, error
    assert no_answer.tell() == 0 and set(codes) <= {0, 1, 2}
    note("malicious loads", f"{'read' if 0 in codes else 'refused'} (folder, {target})", len(codes))
