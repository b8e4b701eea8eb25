"""Each process hears of the end of another one, and tells that of a run from a failure.

The other processes are played by sockets here; tests/train/test_hosts.py has real ones.
"""

import queue
import socket
import subprocess
import sys
import threading

import pytest

from train.distributed import peers
from train.distributed.peers import Peers

HELLO = b"0123456789abcdef"


@pytest.fixture
def left(monkeypatch):
    """What `leave` was told, instead of the end of this process."""
    reasons = queue.SimpleQueue()
    monkeypatch.setattr(peers, "leave", reasons.put)
    monkeypatch.setattr(peers.multihost_utils, "sync_global_devices", lambda name: None)
    return reasons


@pytest.fixture
def others(monkeypatch):
    """Makes this process 0 of three; two threads connect when it says where, after a stranger."""
    links = {}
    threads = []

    def connect(hello, address):
        stranger = socket.create_connection(address)
        stranger.sendall(b"x" * 16 + (1).to_bytes(4))
        for process in (2, 1):
            links[process] = socket.create_connection(address)
            links[process].sendall(hello + process.to_bytes(4))
        assert stranger.recv(1) == b""
        stranger.close()

    def broadcast(said):
        host, port = said[16:].decode().split(":")
        threads.append(threading.Thread(target=connect, args=(said[:16], (host, int(port)))))
        threads[0].start()
        return said

    monkeypatch.setattr("jax.process_count", lambda: 3)
    monkeypatch.setattr(peers, "_broadcast", broadcast)
    yield links
    threads[0].join()
    for link in links.values():
        link.close()


@pytest.fixture
def process_0(monkeypatch):
    """Makes this process 2 of three; gives the socket on which it will call process 0."""
    with socket.create_server(("localhost", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}".encode()
        monkeypatch.setattr("jax.process_count", lambda: 3)
        monkeypatch.setattr("jax.process_index", lambda: 2)
        monkeypatch.setattr(peers, "_broadcast", lambda _: HELLO + address)
        yield server


def test_alone_there_is_nothing_to_watch(monkeypatch):
    monkeypatch.setattr(peers, "_broadcast", None)
    with Peers() as watching:
        assert watching._sockets == {}


def test_process_0_names_the_one_that_ended(others, left):
    with Peers():
        others[2].close()
        assert left.get(timeout=10).startswith("process 2 of the run has ended: start all of them")
        assert left.empty()


def test_a_run_that_is_over_is_no_failure(others, left):
    with Peers():
        for link in others.values():
            link.sendall(b"bye")
    assert [others[process].recv(8, socket.MSG_WAITALL) for process in (1, 2)] == [b"bye", b"bye"]
    assert left.empty()


def test_the_others_may_end_after_process_0(others, left):
    """They say nothing before it leaves, and their sockets close later."""
    with Peers() as watching:
        assert {*watching._sockets} == {1, 2}
    for link in others.values():
        link.close()
    assert left.empty()


def test_an_error_says_no_goodbye(others, left):
    """For the others this process has died."""
    with pytest.raises(ValueError, match="why"), Peers():
        raise ValueError("why")
    assert [others[process].recv(8) for process in (1, 2)] == [b"", b""]


def test_another_process_proves_itself_and_hears_the_end_of_process_0(process_0, left):
    with Peers():
        link, _ = process_0.accept()
        assert link.recv(20, socket.MSG_WAITALL) == HELLO + (2).to_bytes(4)
        link.close()
        assert left.get(timeout=10).startswith("process 0, or another one, of the run has ended")


def test_another_process_ends_with_process_0(process_0, left):
    with Peers():
        link, _ = process_0.accept()
        link.recv(20, socket.MSG_WAITALL)
        link.sendall(b"bye")
    assert link.recv(8) == b"bye"
    link.close()
    assert left.empty()


def test_whoever_leaves_first_says_why_on_one_line():
    """Two threads find out at once; one speaks, and the status is 1 whatever else runs."""
    program = """
import threading
from train.distributed.peers import leave
for name in ("a", "b"):
    threading.Thread(target=leave, args=(f"{name}\\n  is gone",)).start()
threading.Event().wait()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr in ("error: process 0: a is gone\n", "error: process 0: b is gone\n")
