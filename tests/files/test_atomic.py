"""Files that are replaced whole or not at all."""

import errno
import os

import pytest

from nnunet_cfcl.errors import UserError
from nnunet_cfcl.files.atomic import WriteError, backup_path, replace_atomically, writable_folder, write_text_atomically


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
    with pytest.raises(UserError, match="cannot write .*file/sub .Not a directory.; fix: take another"):
        writable_folder(tmp_path / "file" / "sub", "take another")


REFUSALS = {errno.ENOSPC: "free some space", errno.EROFS: "mount the disk writable", errno.EDQUOT: "your quota raised",
            errno.EFBIG: "ulimit -f"}


def _refuse(code):
    def refuse(*arguments, **named):
        raise OSError(code, os.strerror(code))

    return refuse


@pytest.mark.parametrize("code", REFUSALS)
@pytest.mark.parametrize("stage", ["write", "fsync", "replace"])
def test_a_disk_that_refuses_at_any_stage_leaves_the_old_file_and_an_error_that_names_it_and_what_to_do(
        tmp_path, monkeypatch, stage, code):
    file = tmp_path / "a.txt"
    write_text_atomically(file, "old")
    refuse = _refuse(code)
    if stage != "write":
        monkeypatch.setattr(os, stage, refuse)
    with pytest.raises(WriteError) as error:
        replace_atomically(file, refuse if stage == "write" else lambda temporary: temporary.write_text("new"))
    monkeypatch.undo()
    message = str(error.value)
    assert message.startswith(f"cannot write {file} ({os.strerror(code)}); ") and REFUSALS[code] in message
    assert "\n" not in message and "what was there before is as it was" in message
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_a_library_that_says_only_that_it_failed_is_explained_by_the_disk(tmp_path, monkeypatch):
    def fail(temporary):
        temporary.write_text("half")
        monkeypatch.setattr(os, "fsync", _refuse(errno.ENOSPC))
        raise RuntimeError("unexpected pos 576 vs 534")

    with pytest.raises(WriteError, match="a.pth .No space left on device"):
        replace_atomically(tmp_path / "a.pth", fail)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [RuntimeError("of the library"), PermissionError(errno.EACCES, "what is read")])
def test_other_errors_while_writing_are_raised_as_they_are(tmp_path, error):
    def fail(temporary):
        raise error

    with pytest.raises(type(error)) as raised:
        replace_atomically(tmp_path / "a.txt", fail)
    assert raised.value is error and not list(tmp_path.iterdir())


def test_a_user_error_while_writing_is_raised_as_it_is_though_the_disk_is_full(tmp_path, monkeypatch):
    def fail(temporary):
        monkeypatch.setattr(os, "fsync", _refuse(errno.ENOSPC))
        raise UserError("the case cannot be read")

    with pytest.raises(UserError, match="^the case cannot be read$"):
        replace_atomically(tmp_path / "a.txt", fail)


def test_a_folder_that_is_not_there_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(WriteError, match="cannot write .*gone/a.txt .No such file or directory"):
        write_text_atomically(tmp_path / "gone" / "a.txt", "text")


def test_the_file_is_on_disk_before_it_is_renamed_and_its_name_afterwards(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}")
                                                                  else "file"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *names: (order.append("rename"), replace(*names)))
    write_text_atomically(tmp_path / "a.txt", "text")
    assert order == ["file", "rename", "folder"]


def test_a_file_that_is_written_anew_is_kept_beside_all_that_are_kept_already(tmp_path):
    file = tmp_path / "log.jsonl"
    names = []
    for number in range(4):
        file.write_text(str(number))
        names.append(file.replace(backup_path(file, "earlier")).name)
    assert names == ["earlier_log.jsonl", *(f"earlier_{number}_log.jsonl" for number in (2, 3, 4))]
    assert [(tmp_path / name).read_text() for name in names] == ["0", "1", "2", "3"]
