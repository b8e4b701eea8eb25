"""Every signal that ends jobs becomes a stop request; a second one acts as usual."""

import os
import signal

import pytest

from train.run.signals import SIGNALS, stop_on_signals


@pytest.mark.parametrize("number", SIGNALS, ids=lambda s: s.name)
def test_the_first_signal_is_a_request_and_the_second_acts(number):
    """The train loop saves for a request, see test_loop.py. Handlers are restored at the end."""
    usual, received = signal.getsignal(number), []
    signal.signal(number, lambda *_: received.append(number))
    mine = signal.getsignal(number)
    try:
        with stop_on_signals() as stop:
            assert stop.name is None
            os.kill(os.getpid(), number)
            assert stop.name == number.name and received == []
            os.kill(os.getpid(), number)
            assert received == [number]
        assert signal.getsignal(number) is mine
    finally:
        signal.signal(number, usual)


def test_all_ways_to_end_a_job_are_signals():
    """Ctrl-C, kill, a closed terminal, SLURM's --signal=USR1 or USR2."""
    names = {"SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"}
    assert {s.name for s in SIGNALS} == names


def test_a_signal_that_is_ignored_stays_ignored():
    """Under nohup a closed terminal does not stop the run."""
    usual = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.name is None
    finally:
        signal.signal(signal.SIGHUP, usual)
