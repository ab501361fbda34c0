"""Processes that handle the cases of a dataset, such as its pool."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from nnunet_cfcl.errors import UserError
from nnunet_cfcl.runs.watchdog import watched

Dataset = TypeVar("Dataset")
Case = TypeVar("Case")
Result = TypeVar("Result")
# dataset -> function of a case; a class, so that processes find it by its name
Work = Callable[[Dataset], Callable[[Case], Result]]


def with_each(function: Callable[[Case], Result], cases: Sequence[Case], processes: int, what: str
              ) -> Iterator[tuple[Case, Result]]:
    """Yield (case, function(case)) of all cases, see `PoolWorkers.each`; each process gets the function once."""
    with PoolWorkers(function, min(processes, len(cases))) as workers:
        yield from workers.each(_itself, cases, what)


class PoolWorkers(Generic[Dataset]):
    """Run :data:`Work` in processes that are started when there are cases; a context manager.

    An error ends the processes at once: one of them may never return.

    Args:
        dataset: any object that can be pickled; handed to each process once, not with every case.
        processes: number of processes; 1 works in this process.
    """

    def __init__(self, dataset: Dataset, processes: int) -> None:
        self.dataset = dataset
        self.processes = processes
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> PoolWorkers[Dataset]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
                 ) -> None:
        if self._executor is None:
            return
        if error is not None:
            for process in (self._executor._processes or {}).values():
                process.kill()
        with watched("ending the processes of a pool"):
            self._executor.shutdown(wait=True, cancel_futures=True)

    def each(self, work: Work[Dataset, Case, Result], cases: Sequence[Case], what: str
             ) -> Iterator[tuple[Case, Result]]:
        """Yield (case, result) in the order of completion, with a progress bar called ``what``; every finished case is
        progress, see `runs.watchdog.watched`.

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
        if not cases:
            return
        if self._executor is None:
            # not more processes than cases; the check, which comes first, looks at all of them
            self._executor = ProcessPoolExecutor(min(self.processes, len(cases)), multiprocessing.get_context("spawn"),
                                                 _begin, (self.dataset,))
        try:
            futures = {self._executor.submit(_run, work, case): case for case in cases}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise UserError(f"a process was killed, probably for lack of memory ({error})",
                            "run the command again with a smaller -np") from error


_dataset: Any


def _itself(function: Callable[[Case], Result]) -> Callable[[Case], Result]:
    return function


def _begin(dataset: Any) -> None:
    """Keep the dataset of this process, and end the process when its parent does, which nothing else does."""
    global _dataset
    _dataset = dataset
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _run(work: Work[Any, Case, Result], case: Case) -> Result:
    return work(_dataset)(case)
