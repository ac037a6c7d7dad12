"""The quickstart's technical corpus: sentences count once, and services are held out with all their versions."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from tools.quickstart import corpora, corpus, stages, technical

SENTENCE = re.compile(r"[^.!?:]+[.!?:](?= )")


def test_sentences_count_once() -> None:
    seen = {"Deletes a key."}
    text = "<p>Deletes a key. Lists <b>all</b>\n  keys &amp; users. Lists all keys &amp; users. Why: never.</p>"
    assert technical.unseen(text, seen) == "Lists all keys & users. Why: never."
    assert technical.unseen("Why: never. Lists all keys.", seen) == "Lists all keys."


def test_texts_at_any_depth() -> None:
    shapes = [{"documentation": "Two.", "name": "no"}, {"documentation": {}}]
    described = {"documentation": "One.", "shapes": shapes}
    assert list(technical.texts_of(described, {"documentation"})) == ["One.", "Two."]
    values = {"enumDescriptions": ["Three.", "Four."], "enum": ["no"], "description": {"description": "Five."}}
    assert list(technical.texts_of(values, {"description", "enumDescriptions"})) == ["Three.", "Four.", "Five."]


def test_services_of_the_packages(tmp_path: Path) -> None:
    few = re.compile(technical.AMAZON.files.pattern.replace("([^/]+)", "(acm|cloudfront|lambda|sqs|sns)", 1))
    seen: set[str] = set()
    try:
        documents = list(technical.documents(replace(technical.AMAZON, files=few), seen))
    except stages.QuickstartError as error:
        pytest.skip(str(error))
    names = ("acm", "cloudfront", "lambda", "sns", "sqs")
    assert [each.id for each in documents] == [f"amazon/{name}" for name in names]
    for each in documents:
        assert len(each.text) > 10_000 and not re.search(r"</?(p|b|i|a|code|li|ul)\b|&\w+;", each.text)
    # What SQS and SNS say in the same words is only in the one that was read first.
    text = {each.id: each.text for each in documents}
    shared = [
        found
        for found in SENTENCE.findall(text["amazon/sqs"])
        if len(found) > 60 and any(f"{found} " in other for name, other in text.items() if name != "amazon/sqs")
    ]
    assert not shared


def test_corpora_are_told_apart() -> None:
    assert len({corpus.inputs(name) for name in corpora.CORPORA}) == len(corpora.CORPORA) == len(corpora.FOLDERS)
