"""Test that docs/errors.md lists the codes in use."""

import re

from tests.training_runs import REPOSITORY


def test_codes_that_are_raised_are_those_that_are_listed() -> None:
    paths = [path for room in ("megatron/remoe", "tools") for path in (REPOSITORY / room).rglob("*.py")]
    raised = {code for path in paths for code in re.findall(r"REMOE-E\d+", path.read_text())}
    page = (REPOSITORY / "docs" / "errors.md").read_text()
    assert raised == set(re.findall(r"^\| (REMOE-E\d+) \|", page, re.MULTILINE))
