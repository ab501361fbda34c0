"""Fuzz every reader of files for some minutes, and write down what came of it.

    python -m tests.fuzz --minutes 10 --out fuzzing.json --table docs/results/fuzzing.md

All readers take turns. Each has a process of its own, so that one which crashes, hangs or takes all memory costs only
itself: that input counts as a failure too. Inputs that a reader fails on are kept as files beside ``--out`` and can be
given to it again: ``python -m tests.fuzz --replay FILE``, whose name begins with the number of the reader.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from tqdm import tqdm

from nnunet_cfcl.files.atomic import write_text_atomically
from tests.fuzz.mutations import inputs
from tests.fuzz.readers import READERS, Reader
from tests.fuzz.trial import ACCEPTED, FAILED, MOST_MIB, MOST_SECONDS, REFUSED, Bench, Outcome

#: Inputs drawn from one seed.
ROUND = 200
#: A process that takes more address space than this beyond what it has begins to fail.
MOST_BYTES = 4 << 30
#: Seconds by the clock after which a process is given up, on a machine where much else is going on.
HANGS = 600.0
ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass
class Tally:
    """What came of one reader's inputs; ``failures`` are (file, words)."""

    reader: str
    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    failures: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    @property
    def tried(self) -> int:
        """All inputs."""
        return self.accepted + self.refused + len(self.failures)


class Worker:
    """A process in which one reader is tried."""

    def __init__(self, number: int, folder: Path) -> None:
        self._number, self._folder, self._starts = number, folder, 0
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._starts += 1
        folder = self._folder / f"{self._number}_{self._starts}"
        self._process = context.Process(target=_serve, args=(READERS[self._number], folder, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.valid: bytes = self._pipe.recv()

    def give(self, content: bytes) -> Outcome:
        """As `Bench.give`; a process that dies or hangs is a failure, and is started anew."""
        words = "the process died"
        with contextlib.suppress(EOFError, OSError):
            self._pipe.send(content)
            # the process itself says that it was slow, unless it never comes back
            if self._pipe.poll(HANGS):
                return Outcome(*self._pipe.recv())
            words = "hangs"
        self.end()
        self._start()
        return Outcome(FAILED, words)

    def end(self) -> None:
        """Stop the process."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _serve(reader: Reader, folder: Path, pipe: Connection) -> None:
    import resource

    torch.set_num_threads(1)
    # libraries in C say what they think of a file on the console
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    with open("/proc/self/statm") as pages:
        limit = int(pages.read().split()[0]) * resource.getpagesize() + MOST_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    folder.mkdir()
    bench = Bench(reader, folder)
    pipe.send(bench.valid)
    with contextlib.suppress(EOFError):
        while True:
            pipe.send(dataclasses.astuple(bench.give(pipe.recv())))


def fuzz(reader: Reader, worker: Worker, tally: Tally, seconds: float, start: int, out: Path) -> None:
    """Give a reader inputs for some seconds; what it fails on is kept in the folder ``out``."""
    end = time.monotonic() + seconds

    @seed(start)
    @settings(max_examples=ROUND, deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))
    @given(inputs(worker.valid, reader.kind))
    def one_round(content: bytes) -> None:
        # at least one, however busy the machine is
        if time.monotonic() > end and tally.tried:
            return
        outcome = worker.give(content)
        if outcome.kind == ACCEPTED:
            tally.accepted += 1
        elif outcome.kind == REFUSED:
            tally.refused += 1
        else:
            file = out / f"{READERS.index(reader):02d}_{tally.tried:06d}.bin"
            out.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
            tally.failures.append((file.name, outcome.words))

    begun = time.monotonic()
    one_round()
    tally.seconds += time.monotonic() - begun


def run(minutes: float, start: int, out: Path) -> list[Tally]:
    """All readers in turn, several times, for so many minutes; tallies in the order of `READERS`."""
    tallies = [Tally(reader.name) for reader in READERS]
    with _workers() as workers, tqdm(total=round(60 * minutes), unit="s", disable=None) as bar:
        end, number = time.monotonic() + 60 * minutes, 0
        while (left := end - time.monotonic()) > 0 or number < len(READERS):
            place = number % len(READERS)
            fuzz(READERS[place], workers[place], tallies[place], min(left, 60 * minutes / (2 * len(READERS))),
                 start + number, out)
            bar.n = round(60 * minutes - left)
            bar.refresh()
            number += 1
    return tallies


@contextlib.contextmanager
def _workers() -> Iterator[list[Worker]]:
    with TemporaryDirectory(prefix="fuzz_") as folder:
        workers = [Worker(number, Path(folder)) for number in range(len(READERS))]
        try:
            yield workers
        finally:
            for worker in workers:
                worker.end()


def table(tallies: Sequence[Tally], minutes: float, start: int) -> str:
    """The page for the documentation."""
    rows = [f"| {one.reader} | {one.tried:,} | {one.accepted:,} | {one.refused:,} | {len(one.failures)} |"
            for one in tallies]
    tried, failures = sum(one.tried for one in tallies), sum(len(one.failures) for one in tallies)
    return "\n".join([
        "# Fuzzing of every reader of files", "",
        f"    python -m tests.fuzz --minutes {minutes:g} --seed {start} --table docs/results/fuzzing.md", "",
        f"Written by this command. {tried:,} inputs in {minutes:g} minutes, {failures} failures. Inputs are valid "
        "files with bytes flipped, cut, repeated or zeroed, in other encodings, with odd values (NaN, huge numbers, "
        "paths, deep nesting) where others are expected, archives packed again with damaged parts, and random bytes. "
        "*Refused* is the documented error: one line that names the file. Anything else is a failure: another error, a "
        f"crash, more than {MOST_SECONDS:g} s or {MOST_MIB:g} MiB, or a counterfactual that differs from what was "
        "written. *Accepted* inputs are sound, or changed where it does not matter or cannot be told, such as the name "
        "of a case in a table.", "",
        "| Reader | Tried | Accepted | Refused | Failures |", "|---|---|---|---|---|", *rows, ""])


def replay(file: Path) -> Outcome:
    """Give one kept input to its reader, in this process."""
    with TemporaryDirectory(prefix="fuzz_") as folder:
        return Bench(READERS[int(file.name.split("_")[0])], Path(folder)).give(file.read_bytes())


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 1 where a reader failed."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="of the inputs (default: another one each time)")
    parser.add_argument("--out", type=Path, default=ROOT / "fuzzing.json", help="the log (default: %(default)s)")
    parser.add_argument("--table", type=Path, help="also write the log as a page in Markdown")
    parser.add_argument("--replay", type=Path, help="give one kept input to its reader instead")
    arguments = parser.parse_args(argv)
    if arguments.replay:
        outcome = replay(arguments.replay)
        print(f"{outcome.kind}: {outcome.words}")
        return int(outcome.kind == FAILED)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    start = secrets.randbelow(2**31) if arguments.seed is None else arguments.seed
    tallies = run(arguments.minutes, start, arguments.out.with_suffix(".failures"))
    content: dict[str, Any] = {"minutes": arguments.minutes, "seed": start,
                               "readers": [dataclasses.asdict(one) for one in tallies]}
    write_text_atomically(arguments.out, json.dumps(content, indent=1))
    if arguments.table:
        write_text_atomically(arguments.table, table(tallies, arguments.minutes, start))
    print(f"{sum(one.tried for one in tallies)} inputs, {sum(len(one.failures) for one in tallies)} failures, see "
          f"{arguments.out}")
    return int(any(one.failures for one in tallies))


if __name__ == "__main__":
    sys.exit(main())
