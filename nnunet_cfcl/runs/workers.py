"""Processes that do something with every case of a dataset, such as its pool."""

from __future__ import annotations

import multiprocessing
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from nnunet_cfcl.errors import UserError
from nnunet_cfcl.runs.watchdog import how_they_died, show_stacks_when_asked, watched

Dataset = TypeVar("Dataset")
Case = TypeVar("Case")
Result = TypeVar("Result")
#: How long a broken executor's processes may take to be seen as dead.
SECONDS_FOR_ENDS = 3.0
#: So often the processes are looked at while they say nothing.
SECONDS_FOR_A_LOOK = 1.0
# given a dataset, what is done with each of its cases; a class, so that processes find it by its name
Work = Callable[[Dataset], Callable[[Case], Result]]


def with_each(function: Callable[[Case], Result], cases: Sequence[Case], processes: int, what: str
              ) -> Iterator[tuple[Case, Result]]:
    """(case, function(case)) of all cases, see `PoolWorkers.each`; the function is handed to each process once."""
    with PoolWorkers(function, min(processes, len(cases))) as workers:
        yield from workers.each(_itself, cases, what)


class PoolWorkers(Generic[Dataset]):
    """Runs :data:`Work` in processes that are started once, when there are cases for them; a context manager. An error
    ends the processes at once: one of them may never return.

    Args:
        dataset: anything that can be pickled; handed to each process once, not with every case.
        processes: 1 works in this process.
    """

    def __init__(self, dataset: Dataset, processes: int) -> None:
        self.dataset = dataset
        self.processes = processes
        self._executor: ProcessPoolExecutor | None = None
        self._processes: list[BaseProcess] = []

    def __enter__(self) -> PoolWorkers[Dataset]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
                 ) -> None:
        if error is not None:
            for process in self._processes:
                process.kill()
        if self._executor is not None:
            with watched("ending the processes of a pool"):
                self._executor.shutdown(wait=True, cancel_futures=True)

    def each(self, work: Work[Dataset, Case, Result], cases: Sequence[Case], what: str
             ) -> Iterator[tuple[Case, Result]]:
        """(case, result) in the order in which they are done, with a progress bar called ``what``; watched, see
        `runs.watchdog.watched`.

        Raises:
            UserError: a process was killed.
        """
        with watched(what) as beat, tqdm(total=len(cases), desc=what, unit="case", disable=None) as bar:
            for pair in self._serial(work, cases) if self.processes <= 1 else self._parallel(work, cases):
                beat()
                bar.update()
                yield pair

    def _serial(self, work: Work[Dataset, Case, Result], cases: Sequence[Case]) -> Iterator[tuple[Case, Result]]:
        function = work(self.dataset)
        for case in cases:
            yield case, function(case)

    def _parallel(self, work: Work[Dataset, Case, Result], cases: Sequence[Case]) -> Iterator[tuple[Case, Result]]:
        if self._executor is None and cases:
            # not more processes than cases; the check, which comes first, looks at all of them
            self._executor = ProcessPoolExecutor(min(self.processes, len(cases)), multiprocessing.get_context("spawn"),
                                                 _set_dataset, (self.dataset,))
        others = multiprocessing.active_children()
        try:
            try:
                futures = {self._executor.submit(_run, work, case): case for case in cases} if self._executor else {}
            finally:
                # also when this fails since one has died: a process that the executor starts while it finds that out is
                # one that it waits for, for ever, and does not end
                self._processes += [one for one in multiprocessing.active_children() if one not in others]
            done: queue.SimpleQueue[Future[Result]] = queue.SimpleQueue()
            for future in futures:
                future.add_done_callback(done.put)
            for _ in futures:
                future = self._next(done)
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            self._wait_for_ends()
            died = how_they_died(self._processes)
            probably = "" if died and "SIGKILL" not in died else ", probably for lack of memory"
            raise UserError(f"a process was killed{probably} ({died or error}): run the command again with a smaller "
                            "-np") from error

    def _next(self, done: queue.SimpleQueue[Future[Result]]) -> Future[Result]:
        """Waits for it, and looks whether all processes live: the executor does not, until something else wakes it, at
        one that it started after it began to wait.

        Raises:
            BrokenProcessPool: one does not.
        """
        while True:
            try:
                return done.get(timeout=SECONDS_FOR_A_LOOK)
            except queue.Empty:
                ended = [f"pid {one.pid} with {one.exitcode}" for one in self._processes if one.exitcode is not None]
                if ended:
                    raise BrokenProcessPool(f"ended: {', '.join(ended)}") from None

    def _wait_for_ends(self) -> None:
        """Briefly: while the executor's own thread collects an exit status, nobody else sees one."""
        end = time.monotonic() + SECONDS_FOR_ENDS
        while any(process.exitcode is None for process in self._processes) and time.monotonic() < end:
            time.sleep(0.05)


_dataset: Any


def _itself(function: Callable[[Case], Result]) -> Callable[[Case], Result]:
    return function


def _set_dataset(dataset: Any) -> None:
    global _dataset
    _dataset = dataset
    show_stacks_when_asked()


def _run(work: Work[Any, Case, Result], case: Case) -> Result:
    return work(_dataset)(case)
