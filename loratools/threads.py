"""Independent jobs on a few threads, each with one thread of BLAS: the first failure stops the rest."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager


def default_threads() -> int:
    """As many as this process may use, at most eight: beyond that the disk is what one waits for."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def run_all(jobs: Iterable[Callable[[], object]], threads: int) -> None:
    """Run every job; when one raises, those not begun are dropped and its error is raised."""
    waiting = list(jobs)
    if threads <= 1 or len(waiting) <= 1:
        for job in waiting:
            job()
        return
    with ThreadPoolExecutor(min(threads, len(waiting))) as pool:
        futures = [pool.submit(job) for job in waiting]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            for future in futures:
                future.cancel()
        for future in futures:
            if future in done:
                future.result()


class Background:
    """A thread beside the workers for what only waits, such as a sync to disk; leaving waits for it and raises its error."""

    def __enter__(self) -> Background:
        self._pool = ThreadPoolExecutor(1)
        self._started: list[Future[object]] = []
        return self

    def start(self, job: Callable[[], object]) -> None:
        self._started.append(self._pool.submit(job))

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=error is not None)
        if error is None:
            for future in self._started:
                future.result()


@contextmanager
def single_threaded_blas(active: bool = True) -> Iterator[None]:
    """One BLAS thread a caller: two tensors on a thread each are faster than one tensor on two."""
    import torch

    before = torch.get_num_threads()
    with ExitStack() as stack:
        if active:
            torch.set_num_threads(1)
            stack.callback(torch.set_num_threads, before)
        yield
