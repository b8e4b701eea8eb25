"""The loader's thread: in order, errors where they are asked for, no waiting for what hangs."""

import threading
import time

import pytest

from train.data.thread import Thread


def test_runs_in_order_in_one_other_thread():
    thread, seen = Thread("t"), []

    def work(i):
        seen.append((i, threading.current_thread().name))
        return i * i

    futures = [thread.submit(work, i) for i in range(5)]
    assert [f.result(10) for f in futures] == [0, 1, 4, 9, 16]
    assert seen == [(i, "t") for i in range(5)]
    thread.end()


def test_an_error_is_the_result_and_the_thread_goes_on():
    thread = Thread("t")
    broken, fine = thread.submit(int, "x"), thread.submit(int, "7")
    with pytest.raises(ValueError, match="invalid literal"):
        broken.result(10)
    assert fine.result(10) == 7
    thread.end()


def test_cancelled_work_is_not_done():
    thread, gate, seen = Thread("t"), threading.Event(), []
    thread.submit(gate.wait, 10)
    late = thread.submit(seen.append, 1)
    assert late.cancel()
    gate.set()
    assert thread.submit(len, seen).result(10) == 0
    thread.end()


def test_the_end_does_not_wait_for_work_that_hangs():
    thread, gate = Thread("t"), threading.Event()
    thread.submit(gate.wait, 30)
    begun = time.perf_counter()
    thread.end(timeout=0.1)
    assert time.perf_counter() - begun < 5
    gate.set()
    Thread("never begun").end()  # nothing to end, nothing to wait for
