"""Test the folder for compiled helpers of a user without a home."""

import os
import tempfile
from pathlib import Path

import pytest

from megatron.remoe.files.files import find_cache_folder


def test_a_temporary_folder_of_others_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = find_cache_folder()
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
    assert find_cache_folder() == folder
    folder.chmod(0o777)
    private = find_cache_folder()
    assert private != folder and private.stat().st_mode & 0o777 == 0o700
    folder.rmdir()
    folder.symlink_to(private)
    assert find_cache_folder() not in (folder, private)
    assert os.listdir(private) == []
