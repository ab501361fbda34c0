"""Files that are replaced whole or not at all."""

import pytest

from nnunet_cfcl.atomic import replace_atomically, writable_folder, write_text_atomically
from nnunet_cfcl.errors import UserError


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "a.txt"
    write_text_atomically(file, "old")

    def fail(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_atomically(file, fail)
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_half_a_file_left_by_a_kill_is_never_taken_for_a_new_one(tmp_path):
    file = tmp_path / "a.txt"
    write_text_atomically(file, "good")
    (tmp_path / "a.txt.tmp").write_text("ha")
    replace_atomically(file, lambda temporary: None)
    assert file.read_text() == "good" and list(tmp_path.iterdir()) == [file]


def test_a_write_replaces_the_content_and_leaves_no_temporary_file(tmp_path):
    file = tmp_path / "a.txt"
    write_text_atomically(file, "one")
    write_text_atomically(file, "zwei ä")
    assert file.read_text(encoding="utf-8") == "zwei ä" and list(tmp_path.iterdir()) == [file]


def test_a_folder_is_made_and_nothing_is_left_in_it(tmp_path):
    assert writable_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert not list((tmp_path / "a" / "b").iterdir())


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*file/sub .Not a directory.; take another"):
        writable_folder(tmp_path / "file" / "sub", "take another")
