"""Test that the registry lists the codes in use, and that docs/errors.md is its page."""

import re

from megatron.remoe.start.codes import CODES, page
from tests.training_runs import REPOSITORY


def test_the_page_is_the_registrys() -> None:
    assert (REPOSITORY / "docs" / "errors.md").read_text() == page()


def test_codes_that_are_raised_are_those_that_are_listed() -> None:
    paths = [path for room in ("megatron/remoe", "tools") for path in (REPOSITORY / room).rglob("*.py")]
    sources = [path.read_text() for path in paths if path.name != "codes.py"]
    raised = {code for source in sources for code in re.findall(r"REMOE-E\d+", source)}
    assert raised == {line.split()[0] for line in CODES}
