"""The stream of batches: the same everywhere, from any position, on any number of hosts."""

import functools
import inspect
import json
import os
import threading
import time

import numpy as np
import pytest

from train.data import loader as loader_module
from train.data.loader import Shard
from train.data.open import open_data
from train.data.tokens.cache import ReadOptions


@pytest.fixture
def path(write):
    rows = [{"question": f"Q{i}", "answer": "A" * (i % 37 + 1)} for i in range(60)]
    return write("a.jsonl", rows)


@pytest.fixture
def opened(path, tokenizer):
    """Open a loader over 60 chats, 96 tokens a row, batches of 4; takes changes of these."""
    loaders = []

    def open_(**changes):
        loaders.append(
            open_data([path], tokenizer, **{"seq_len": 96, "batch_size": 4, "seed": 7} | changes)
        )
        return loaders[-1]

    yield open_
    for loader in loaders:
        loader.close()


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def joined(parts) -> list[np.ndarray]:
    """Return the arrays of the rows of several hosts."""
    return [np.concatenate(field) for field in zip(*(part[:5] for part in parts), strict=True)]


def test_batches_have_the_promised_shapes_and_types(opened):
    *batch, sources = next(opened())
    assert {field.shape for field in batch} == {(4, 96)}
    assert [str(field.dtype) for field in batch] == ["int32", "int32", "float32", "int32", "int32"]
    assert sources is None  # the data are one file


def test_the_same_arguments_give_the_same_batches(opened):
    a, b = opened(), opened()
    assert all(same(next(a), next(b)) for _ in range(40))


def test_another_seed_gives_other_batches(opened):
    assert not same(next(opened()), next(opened(seed=8)))


def test_every_epoch_holds_every_row_once_in_another_order(opened):
    loader = opened(batch_size=1)
    epochs = [[next(loader).tokens.tobytes() for _ in range(loader.report.rows)] for _ in range(3)]
    assert len(set(epochs[0])) == loader.report.rows
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]
    assert loader.epoch == 3


def test_batch_size_only_divides_the_stream(opened):
    ones, fours = opened(batch_size=1), opened(batch_size=4)
    rows = [next(ones).tokens for _ in range(40)]
    assert np.array_equal(np.concatenate(rows), np.concatenate([next(fours)[0] for _ in range(10)]))


@pytest.mark.parametrize("taken", [0, 1, 2, 9, 26, 33])
def test_resume_is_exact_at_any_point(opened, taken):
    """The state survives JSON, and restoring works in a new loader and in the old one."""
    loader = opened()
    for _ in range(taken):
        next(loader)
    state = json.loads(json.dumps(loader.state()))
    ahead = [next(loader) for _ in range(5)]
    fresh = opened()
    next(fresh)
    for resumed in (fresh, loader):
        resumed.restore(state)
        assert resumed.state() == state
        assert all(same(next(resumed), batch) for batch in ahead)


@pytest.mark.parametrize("host_count", [2, 4])
def test_hosts_together_make_the_batch_of_one(opened, host_count):
    whole = opened()
    hosts = [opened(shard=Shard(i, host_count)) for i in range(host_count)]
    for _ in range(20):
        parts = [next(host) for host in hosts]
        assert parts[0].tokens.shape == (4 // host_count, 96)
        assert same(next(whole)[:5], joined(parts))
    state = hosts[0].state()
    assert all(host.state() == state for host in [*hosts, whole])


def test_resume_on_another_number_of_hosts(opened):
    one, half = opened(), opened(shard=Shard(1, 2))
    for _ in range(3):
        next(one)
    half.restore(one.state())
    assert np.array_equal(next(half).tokens, next(one).tokens[2:])


def test_resume_with_another_number_of_workers_and_hosts(opened, tmp_path):
    """The cache is made by one process or by three; the state goes from one host to four."""
    one = opened(reading=ReadOptions(cache=tmp_path / "one", workers=1, chunk=1024))
    reading = ReadOptions(cache=tmp_path / "three", workers=3, chunk=1024)
    four = [opened(reading=reading, shard=Shard(i, 4)) for i in range(4)]
    for _ in range(7):
        next(one)
    state = json.loads(json.dumps(one.state()))
    for host in four:
        host.restore(state)
    for _ in range(20):
        parts = [next(host) for host in four]
        assert same(next(one)[:5], joined(parts))


def test_fewer_rows_than_the_batch_repeats_rows(write, tokenizer):
    path = write("a.jsonl", [{"question": "Q", "answer": "A"}])
    with open_data([path], tokenizer, seq_len=32, batch_size=3) as loader:
        assert loader.report.rows == 1
        batch = next(loader)
        assert (batch.tokens == batch.tokens[:1]).all()
        assert batch.loss_mask.sum() == 3 * loader.report.loss_tokens
        assert loader.epoch == 3


@pytest.mark.parametrize("size", [1, 3])
def test_a_batch_larger_than_the_data_is_said(write, tokenizer, size):
    path = write("a.jsonl", [{"question": "Q", "answer": "A"}])
    with open_data([path], tokenizer, seq_len=32, batch_size=size) as loader:
        said = "a batch has 3 rows and the data 1: every batch has each row 3 times"
        assert loader.report.notes() == [f"{said}; lower --batch_size"] * (size == 3)


@pytest.mark.parametrize("change", ["other ids", "cut off"])
def test_a_cache_that_changes_under_a_run_stops_it_with_one_line(opened, tmp_path, change):
    """A loss of -22 and SIGBUS are what was seen before."""
    loader = opened(reading=ReadOptions(cache=tmp_path / "cache", workers=1))
    next(loader)
    [file] = (tmp_path / "cache").rglob("*.tokens")
    content = file.read_bytes()
    file.write_bytes(
        b"\xff\xff\xff\x7f" * (len(content) // 4) if change == "other ids" else content[:99]
    )
    with pytest.raises(
        ValueError, match=r"tokens was changed while it was used: start again"
    ) as error:
        for _ in range(20):
            next(loader)
    assert "\n" not in str(error.value)


def test_an_id_outside_the_vocabulary_stops_the_run_with_one_line(opened, tmp_path):
    """Even if the file looks unchanged."""
    loader = opened(reading=ReadOptions(cache=tmp_path / "cache", workers=1))
    [file] = (tmp_path / "cache").rglob("*.tokens")
    before = file.stat()
    with file.open("r+b") as data:
        data.write(b"\0\0\1\0" * 60)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(
        ValueError, match="the token cache holds id 65,536, and the tokenizer has 265 ids"
    ):
        for _ in range(20):
            next(loader)


@pytest.mark.parametrize(
    "change",
    [{"seed": 8}, {"seq_len": 97}, {"too_long": "head", "seq_len": 40}],
)
def test_a_position_in_other_data_is_refused(opened, change):
    with pytest.raises(ValueError, match="belongs to other data"):
        opened(**change).restore(opened().state())


def test_a_position_in_changed_files_is_refused(opened, path):
    state = opened().state()
    path.write_text(path.read_text().replace("Q17", "Q00"))
    with pytest.raises(ValueError, match="belongs to other data"):
        opened().restore(state)


@pytest.mark.parametrize("state", [{}, {"row": -1, "fingerprint": ""}, {"row": 1.5}])
def test_what_is_no_position_is_refused(opened, state):
    with pytest.raises(ValueError, match="not a data position"):
        opened().restore(state)


def test_an_error_in_the_thread_surfaces_and_the_position_stays(opened, monkeypatch):
    whole, loader = opened(), opened()
    expected = [next(whole) for _ in range(2)]
    assert same(next(loader), expected[0])
    loader.restore(loader.state())  # nothing made ahead

    def broken(*args, **kwargs):
        assert threading.current_thread() is not threading.main_thread()
        raise OSError("disk gone")

    state = loader.state()
    with monkeypatch.context() as patch:
        patch.setattr(loader_module, "fill", broken)
        for _ in range(2):
            with pytest.raises(OSError, match="disk gone"):
                next(loader)
        assert loader.state() == state
    assert same(next(loader), expected[1])


class Counted:
    """`fill`, which counts the batches it made, and takes its time as if the disk were slow."""

    def __init__(self, fill, pause: float = 0.0):
        self.fill, self.pause, self.done = fill, pause, 0

    def __call__(self, *args, **kwargs):
        time.sleep(self.pause)
        batch = self.fill(*args, **kwargs)
        self.done += 1
        return batch


def test_batches_are_made_while_the_caller_works(opened, monkeypatch):
    """Work that takes longer than a batch waits for the first one alone."""
    loader = opened()
    with monkeypatch.context() as patch:
        patch.setattr(loader_module, "fill", slow := Counted(loader_module.fill, pause=0.05))
        next(loader)
        first = loader.wait_seconds
        assert first >= 0.05
        deadline = time.monotonic() + 30
        while slow.done < 1 + loader_module.AHEAD and time.monotonic() < deadline:
            time.sleep(0.01)
        next(loader)
        assert loader.wait_seconds - first < 0.05


def test_no_more_than_the_limit_is_made_ahead(opened, monkeypatch):
    loader = opened()
    with monkeypatch.context() as patch:
        patch.setattr(loader_module, "fill", counted := Counted(loader_module.fill))
        for number in range(1, 5):
            next(loader)
            time.sleep(0.2)
            assert counted.done <= number + loader_module.AHEAD


def test_waiting_is_counted_where_batches_come_too_late(opened, monkeypatch):
    loader = opened()
    with monkeypatch.context() as patch:
        patch.setattr(loader_module, "fill", Counted(loader_module.fill, pause=0.02))
        for _ in range(10):
            next(loader)
    assert loader.wait_seconds >= 10 * 0.02


@pytest.mark.parametrize("seconds", [6e13, float("inf")])
def test_the_wait_for_a_batch_may_be_without_limit(opened, seconds):
    assert same(opened().next(timeout=seconds), next(opened()))


def test_closing_ends_the_thread(opened):
    loader = opened()
    next(loader)
    loader.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("loader") and t.is_alive()]


def test_the_built_in_text_needs_no_files(tokenizer):
    with open_data(None, tokenizer, seq_len=512, batch_size=2) as loader:
        assert 300_000 < loader.report.tokens < 400_000
        assert loader.report.efficiency > 0.99
        assert loader.report.notes() == []
        next(loader)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_len": 1}, "seq_len=1 must be at least 2"),
        ({"seed": -1}, "seed=-1 must not be negative"),
        ({"batch_size": 0}, "batch_size=0 must be a positive multiple"),
        ({"batch_size": 3, "shard": Shard(0, 2)}, "batch_size=3 must be a positive multiple of"),
        ({"shard": Shard(1, 1)}, "host 1 must be between 0 and"),
        ({"seq_len": 8}, "none of the 60 documents can be trained on at seq_len=8"),
    ],
)
def test_bad_arguments_are_one_clear_line(opened, change, message):
    with pytest.raises(ValueError) as error:
        opened(**change)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# Without the checks of types that pytest adds, as callers have it.
plain_open = functools.partial(inspect.unwrap(open_data), seq_len=8, batch_size=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packing": "best"}, "packing='best' must be one of fit, concat, xtuner"),
        ({"too_long": "split"}, "too_long='split' must be one of drop, head, tail"),
        ({"split": "test"}, "split='test' must be one of train, val"),
    ],
)
def test_a_name_that_is_unknown_is_refused(path, tokenizer, change, message):
    """None of them means another one."""
    with pytest.raises(ValueError, match=message):
        plain_open([path], tokenizer, **change)


def test_one_path_is_no_list_of_paths(path, tokenizer):
    """Not its characters, of which "/" would be a directory."""
    for one in (path, str(path)):
        with pytest.raises(ValueError, match=r"must be a list of files: give \['"):
            plain_open(one, tokenizer)


def test_no_files_is_not_the_built_in_text(tokenizer):
    with pytest.raises(ValueError, match="no data files are named"):
        open_data([], tokenizer, seq_len=8, batch_size=1)
