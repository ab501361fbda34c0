"""Replacement of a folder, and what a kill leaves of it."""

import os

import pytest

from nnunet_cfcl.errors import UserError
from nnunet_cfcl.files.folder_swap import link_or_copy, restored, swap_in


@pytest.fixture
def new(tmp_path):
    (tmp_path / "labels.tmp").mkdir()
    (tmp_path / "labels.tmp" / "a").write_text("new")
    return tmp_path / "labels.tmp"


def test_a_folder_takes_the_place_of_another_or_of_none(tmp_path, new):
    swap_in(new, tmp_path / "labels")
    assert os.listdir(tmp_path) == ["labels"]
    new.mkdir()
    (new / "b").write_text("newer")
    swap_in(new, tmp_path / "labels")
    assert os.listdir(tmp_path) == ["labels"] and os.listdir(tmp_path / "labels") == ["b"]


def test_a_kill_between_the_renamings_loses_nothing(tmp_path, new, monkeypatch):
    folder = tmp_path / "labels"
    folder.mkdir()
    (folder / "a").write_text("old")
    rename = os.replace

    def killed(source, target):
        if source == new:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        swap_in(new, folder)
    assert not folder.exists() and (new / "a").read_text() == "new"
    assert (restored(folder) / "a").read_text() == "old"


def test_a_folder_that_cannot_be_renamed_is_a_user_error(tmp_path, new, monkeypatch):
    def fail(source, target):
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match="labels cannot be replaced by .*labels.tmp .Device or resource busy.; fix"):
        swap_in(new, tmp_path / "labels")


@pytest.mark.parametrize("has_links", [True, False])
def test_a_linked_file_keeps_content_and_time(tmp_path, new, monkeypatch, has_links):
    if not has_links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(95, "Operation not supported")))
    os.utime(new / "a", ns=(1, 1_700_000_000_123_456_789))
    (tmp_path / "b").write_text("in the way")
    link_or_copy(new / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "new" and (tmp_path / "b").samefile(new / "a") == has_links
    assert (tmp_path / "b").stat().st_mtime_ns == (new / "a").stat().st_mtime_ns
    link_or_copy(new / "missing", tmp_path / "b")
    assert not (tmp_path / "b").exists()
