"""threads: every job once, the first failure told, BLAS back as it was."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial

import pytest
import torch

from loratools.threads import Background, default_threads, run_all, single_threaded_blas


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_every_job_runs_once(threads: int) -> None:
    seen: list[int] = []
    run_all([partial(seen.append, number) for number in range(50)], threads)
    assert sorted(seen) == list(range(50))
    run_all([], threads)


def test_one_thread_keeps_the_order() -> None:
    seen: list[int] = []
    run_all([partial(seen.append, number) for number in range(9)], 1)
    assert seen == list(range(9))


def test_jobs_run_beside_each_other() -> None:
    barrier = threading.Barrier(3, timeout=20)
    run_all([barrier.wait] * 3, 3)  # each waits for the other two


@pytest.mark.parametrize("threads", [1, 3])
def test_the_first_failure_is_raised_and_what_had_not_begun_is_dropped(threads: int) -> None:
    seen: list[int] = []

    def job(number: int) -> None:
        if number == 2:
            raise KeyError("two")
        time.sleep(0.01)
        seen.append(number)

    jobs: list[Callable[[], object]] = [partial(job, number) for number in range(200)]
    with pytest.raises(KeyError, match="two"):
        run_all(jobs, threads)
    assert len(seen) < 100


def test_the_background_is_waited_for_and_its_error_raised() -> None:
    done: list[int] = []
    with Background() as background:
        background.start(lambda: (time.sleep(0.05), done.append(1)))
    assert done == [1]
    with pytest.raises(ZeroDivisionError), Background() as background:
        background.start(lambda: 1 // 0)


def test_an_error_in_front_wins_over_one_in_the_background() -> None:
    with pytest.raises(KeyError), Background() as background:
        background.start(lambda: 1 // 0)
        raise KeyError


@pytest.mark.parametrize("active", [True, False])
def test_blas_threads_are_put_back(active: bool) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError), single_threaded_blas(active):
            assert torch.get_num_threads() == (1 if active else 2)
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_default_is_what_this_process_may_use() -> None:
    assert 1 <= default_threads() <= 8
