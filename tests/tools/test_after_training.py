"""What tools/after_training holds against the training; the tool itself is run on a finished quickstart."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from tools.after_training import tables
from tools.after_training.command import Quickstart
from tools.after_training.followed import Followed
from tools.common.errors import ToolError
from tools.common.places import ROOT

GOOD = Followed(
    logits=1e-6,
    printed={"code": 1.5, "drama": 1.8},
    alone={"code": 1.50009, "drama": 1.8},
    text="My lord, the king",
    before=[2.0, 1.5],
    after=[2.00001, 1.5],
)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("logits", math.nan, "logits differ by nan of the largest"),
        ("alone", {"code": 1.5, "drama": 1.8002}, "the loss on drama is 1.8002, and Megatron printed 1.8"),
        ("text", "My lord, ", "'My lord, ' was continued as 'My lord, '"),
        ("after", [2.0, 1.6], "the next losses are [2.0, 1.6], and the training's own [2.0, 1.5]"),
        ("after", [math.nan, 1.5], "the next losses are [nan, 1.5], and the training's own [2.0, 1.5]"),
        ("after", [2.0, math.nan], "the next losses are [2.0, nan], and the training's own [2.0, 1.5]"),
    ],
)
def test_what_is_wrong_is_named(field: str, value: object, message: str) -> None:
    assert GOOD.wrong() == []
    assert replace(GOOD, **{field: value}).wrong() == [message]


def test_tables() -> None:
    scores = [{"task": "arc_easy", "metric": "acc", "value": 0.25, "error": 0.0123, "documents": 2376}]
    measured = {
        "tasks": dict.fromkeys(("dense", "moe", "remoe"), scores),
        "speed": {
            model: {"prefill": rate, "decode": 8.0} for model, rate in (("dense", 4.0), ("moe", 1.0), ("remoe", 2.0))
        },
        "loss by K": {"none": 1.5, "1": 1.6},
    }
    lines = tables.markdown({"dense": GOOD, "moe": GOOD, "remoe": GOOD}, measured).splitlines()
    assert "| loss on code: Megatron's, the folder's |" + " 1.500000, 1.500090 |" * 3 in lines
    assert "| arc_easy, acc, 2,376 documents |" + " 0.25 ± 0.012 |" * 3 in lines
    assert "| reading, tokens/s against dense | 1.00 | 0.25 | 0.50 |" in lines
    assert lines[-5:] == ["| ReMoE's loss on code | 1.5000 | 1.6000 |", "", "```", GOOD.text, "```"]
    page = (ROOT / "docs" / "huggingface.md").read_text(encoding="utf-8")
    assert page.count(tables.BEGIN) == page.count(tables.END) == 1


def test_other_folders_are_no_quickstarts(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="is not a finished quickstart.*Run it first"):
        Quickstart(tmp_path)
