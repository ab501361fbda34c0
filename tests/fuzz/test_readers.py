"""A short run of the fuzzing, always of the same inputs; `python -m tests.fuzz` makes long ones."""

import dataclasses
import importlib
import json
import os
import signal
import zlib

import pytest
from hypothesis import HealthCheck, given, seed, settings

from nnunet_cfcl.errors import UserError
from tests.fuzz.mutations import inputs
from tests.fuzz.readers import READERS, Reader
from tests.fuzz.trial import ACCEPTED, FAILED, REFUSED, Bench, Outcome

command = importlib.import_module("tests.fuzz.__main__")
EXAMPLES = 25


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_a_reader_takes_what_is_valid_and_refuses_what_is_not_by_an_error_that_names_the_file(reader, tmp_path):
    bench = Bench(reader, tmp_path)
    assert bench.give(bench.valid) == Outcome(ACCEPTED)

    @seed(zlib.crc32(reader.name.encode()))
    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(inputs(bench.valid, reader.kind))
    def check(content):
        outcome = bench.give(content)
        assert outcome.kind != FAILED, outcome.words

    check()


def broken(error):
    def read(folder):
        raise error

    return Reader("broken", "a", "text", lambda folder: (folder / "a.csv").write_text("x"), read)


@pytest.mark.parametrize(("error", "kind"), [
    (KeyError("x"), FAILED), (MemoryError(), FAILED), (UserError("something is wrong"), FAILED),
    (UserError("a.csv is wrong", details=["and more"]), FAILED), (UserError("a.csv is wrong", "correct it"), REFUSED)])
def test_only_an_error_of_one_line_that_names_the_file_is_a_refusal(error, kind, tmp_path):
    reader = dataclasses.replace(broken(error), file="a.csv")
    assert Bench(reader, tmp_path).give(b"y").kind == kind


def test_inputs_that_fail_are_counted_kept_and_can_be_given_again(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "READERS", (dataclasses.replace(broken(KeyError("x")), file="a.csv"),))
    arguments = ["--minutes", "0.01", "--seed", "1", "--out", tmp_path / "log.json", "--table", tmp_path / "log.md"]
    assert command.main(list(map(str, arguments))) == 1
    log = json.loads((tmp_path / "log.json").read_text())
    kept, tally = sorted((tmp_path / "log.failures").iterdir()), log["readers"][0]
    assert len(kept) == len(tally["failures"]) > 0 and "KeyError" in tally["failures"][0][1]
    assert f"| broken | {len(kept)} | 0 | 0 | {len(kept)} |" in (tmp_path / "log.md").read_text()
    assert command.replay(kept[0]).kind == FAILED


def test_a_reader_that_kills_its_process_is_a_failure_and_the_next_input_is_tried(tmp_path, monkeypatch):
    def read(folder):
        if (folder / "a.csv").read_bytes() == b"die":
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(command, "READERS", (dataclasses.replace(broken(None), file="a.csv", read=read),))
    worker = command.Worker(0, tmp_path)
    assert [worker.give(content) for content in (b"x", b"die", b"x")] == [
        Outcome(ACCEPTED), Outcome(FAILED, "the process died"), Outcome(ACCEPTED)]
    worker.end()
