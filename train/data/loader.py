"""From files to an endless stream of packed batches, at an exact position.

The stream is the rows of epoch 0 in a random order, then those of epoch 1 in another, and so
on; batch k is the rows k * batch_size .. (k + 1) * batch_size - 1 of it. No row is dropped at
an epoch's end: a batch may hold rows of two epochs, and where there are fewer rows than
`batch_size` a batch holds some rows several times. A position in the stream is therefore one
number, and going to it is free.

Every host computes the same stream and fills only its own rows of each batch.
"""

import hashlib
import math
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
from jaxtyping import Int64

from train.data.pack.order import shuffled
from train.data.pack.packing import Batch, Rows, fill
from train.data.pack.spans import Pieces
from train.data.pack.summary import summarise
from train.data.thread import Thread
from train.data.tokens.dataset import Dataset

AHEAD = 2  # batches made while the caller works on one: one that waits, one in the making


class Loader(Iterator[Batch]):
    """An endless iterator of batches, made ahead in one background thread.

    At most `AHEAD` batches wait to be taken. An error in the thread is raised by `next`, as it is;
    the position then stays where it was. The position is that of the batch `next` returns next,
    whatever was made ahead. Also a context manager that ends the thread; without it the thread ends
    with the process.

    Every host opens the same files with its own `host_index`, and its batches are its rows, in
    order, of the batches that a single host would get: rows `host_index * batch_size / host_count`
    and on. States are the same on all hosts and fit any number of them.

    Attributes:
        report: what became of the data.
        batch_size: rows of a batch over all hosts; `next` returns `batch_size / host_count`.
        fingerprint: hash of all rows and their order; a state fits only the same data.
        wait_seconds: how long `next` has waited so far, in all, for batches that were not ready.
    """

    def __init__(
        self,
        dataset: Dataset,
        pieces: Pieces,
        rows: Rows,
        *,
        seq_len: int,
        batch_size: int,
        pad_id: int,
        seed: int = 0,
        host_index: int = 0,
        host_count: int = 1,
    ):
        check_shares(batch_size, host_index, host_count)
        self.report = summarise(dataset, pieces, rows, seq_len)
        self.batch_size = batch_size
        self.fingerprint = _fingerprint(dataset, pieces, rows, seq_len, seed)
        self._dataset, self._pieces, self._rows = dataset, pieces, rows
        self._seq_len, self._pad_id, self._seed = seq_len, pad_id, seed
        self._share = batch_size // host_count
        self._skipped = host_index * self._share
        self._row = 0  # of the stream: the first one of the next batch
        self._order = (-1, np.zeros(0, np.int64))  # the last epoch asked for, and its row order
        self.wait_seconds = 0.0
        self._made: deque[Future[Batch]] = deque()
        self._thread = Thread("loader")

    def __next__(self) -> Batch:
        return self.within(math.inf)

    def within(self, seconds: float) -> Batch:
        """Returns the next batch.

        Args:
            seconds: to wait for it at most.

        Raises:
            TimeoutError: it did not come, and which documents it has; `close` then waits for
                nothing.
        """
        while len(self._made) <= AHEAD:
            row = self._row + len(self._made) * self.batch_size
            self._made.append(self._thread.submit(self._make, row))
        begun = time.perf_counter()
        try:
            batch = self._made[0].result(min(seconds, threading.TIMEOUT_MAX))
        except BaseException as error:
            # A TimeoutError may also be what the reading of a file ended in.
            stalled = isinstance(error, TimeoutError) and not self._made[0].done()
            self._forget()
            if not stalled:
                raise
            names = self.documents(self.state())
            raise TimeoutError(
                f"the data made no batch in {seconds} seconds; it was to read {names[0]}"
                + (f" .. {names[-1]}" if len(names) > 1 else "")
            ) from error
        finally:
            self.wait_seconds += time.perf_counter() - begun
        self._made.popleft()
        self._row += self.batch_size
        return batch

    def documents(self, state: dict[str, Any]) -> list[str]:
        """Names what is in a batch: "file:line" of each of its documents, on all hosts, in order.

        Args:
            state: the position before it was drawn.
        """
        first = state["row"]
        names: dict[str, None] = {}
        for place in range(first, first + self.batch_size):
            epoch, index = divmod(place, len(self._rows))
            row = self._epoch_order(epoch)[index]
            start, end = self._rows.offsets[row : row + 2]
            for d in self._pieces.document[self._rows.pieces[start:end]]:
                file = self._dataset.files[self._dataset.file[d]].file
                names[f"{file}:{self._dataset.line[d]}"] = None
        return list(names)

    @property
    def epoch(self) -> float:
        """Passes over the data so far, as a fraction."""
        return self._row / len(self._rows)

    @property
    def lengths(self) -> Int64[np.ndarray, " P"]:
        """Tokens of every piece of a document in an epoch."""
        return self._pieces.length

    def once(self) -> Iterator[Batch]:
        """Yields every row once, in batches; rows that fill the last batch up have no loss."""
        for row in range(0, len(self._rows), self.batch_size):
            batch = self._make(row)
            first = row + self._skipped
            batch.loss_mask[max(0, len(self._rows) - first) :] = 0
            yield batch

    def state(self) -> dict[str, Any]:
        """Returns the position of the next batch, small and fit for JSON."""
        return {"row": self._row, "fingerprint": self.fingerprint}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to a position: the next batch is the one that was next when it was taken.

        The number of hosts may differ; with another batch size the stream goes on at the same
        row.

        Raises:
            ValueError: the state belongs to other data, tokenizer, sequence length or seed.
        """
        row, fingerprint = state.get("row"), state.get("fingerprint")
        if not isinstance(row, int) or row < 0 or not isinstance(fingerprint, str):
            raise ValueError(f"not a data position: {state!r:.100}")
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"the saved data position belongs to other data ({fingerprint}, this is"
                f" {self.fingerprint}): use the same files, tokenizer, seq_len and seed"
            )
        self._forget()
        self._row = row

    def close(self) -> None:
        """Ends the background thread."""
        self._forget()
        self._thread.end()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make(self, row: int) -> Batch:
        first = row + self._skipped
        which = np.array([self._row_at(i) for i in range(first, first + self._share)], np.int64)
        return fill(
            self._dataset,
            self._pieces,
            self._rows,
            which,
            seq_len=self._seq_len,
            pad_id=self._pad_id,
        )

    def _row_at(self, place: int) -> int:
        epoch, index = divmod(place, len(self._rows))
        if self._order[0] != epoch:
            self._order = (epoch, self._epoch_order(epoch))
        return int(self._order[1][index])

    def _epoch_order(self, epoch: int) -> Int64[np.ndarray, " R"]:
        # 1 sets the key apart from that of the packing's shuffle, which is the seed alone.
        return shuffled(len(self._rows), self._seed, 1, epoch)

    def _forget(self) -> None:
        """Drops what was made ahead."""
        for future in self._made:
            future.cancel()
        self._made.clear()


def check_shares(batch_size: int, host_index: int, host_count: int) -> None:
    """Checks that the hosts can share a batch in equal parts.

    Raises:
        ValueError: they cannot.
    """
    if batch_size < 1 or batch_size % host_count:
        raise ValueError(f"{batch_size=} must be a positive multiple of {host_count=}")
    if not 0 <= host_index < host_count:
        raise ValueError(f"{host_index=} must be between 0 and {host_count=} - 1")


def _fingerprint(dataset: Dataset, pieces: Pieces, rows: Rows, seq_len: int, seed: int) -> str:
    digest = hashlib.blake2b(f"{seq_len} {seed} {dataset.digest}".encode(), digest_size=8)
    for array in (pieces.start, pieces.length, pieces.continues, rows.pieces, rows.offsets):
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()
