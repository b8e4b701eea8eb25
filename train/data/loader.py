"""Packed batches in an endless stream, from an exact position.

The stream is the rows of epoch 0 in a random order, then those of epoch 1 in another, and so on;
batch k is the rows k * batch_size .. (k + 1) * batch_size - 1 of it. No row is dropped at an
epoch's end: a batch may have rows of two epochs, and if there are fewer rows than `batch_size` a
batch has some rows several times. A position in the stream is therefore one number, and going to it
is free.

Every host computes the same stream and fills only its own rows of each batch.
"""

import dataclasses
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

from train.data.pack.mixture import permutation
from train.data.pack.packing import Batch, PackedRows, fill, source_dtype
from train.data.pack.spans import Spans
from train.data.report import Report
from train.data.thread import Thread
from train.data.tokens.dataset import Dataset

AHEAD = 2  # batches made while the caller works on one: one that waits, one in the making


@dataclasses.dataclass(frozen=True, slots=True)
class Shard:
    """The part of every batch that one host has."""

    index: int = 0  # number of the host, 0..count-1, as `jax.process_index()`
    count: int = 1  # hosts that share each batch in equal parts, as `jax.process_count()`

    def rows_of(self, batch_size: int) -> int:
        """Return the rows of a batch for each host; raise ValueError if the parts are not equal."""
        if batch_size < 1 or batch_size % self.count:
            raise ValueError(f"{batch_size=} must be a positive multiple of the {self.count} hosts")
        if not 0 <= self.index < self.count:
            raise ValueError(f"host {self.index} must be between 0 and {self.count} - 1")
        return batch_size // self.count


class Loader(Iterator[Batch]):
    """An endless iterator of batches, made ahead in one background thread.

    At most `AHEAD` batches wait to be taken. `next` raises an error of the thread as it is; the
    position, that of the batch that `next` returns next, then stays. Also a context manager that
    ends the thread; without it the thread ends with the process.

    Every host opens the same files with its own shard, and gets its rows, in order, of the batches
    that a single host would get: rows `index * batch_size / count` and on. States are the same on
    all hosts and fit any number of them.

    Attributes:
        report: counts of everything in the data.
        sources: paths of the sources, of which `Batch.sources` has the indices if there are
            several.
        batch_size: rows of a batch over all hosts; `next` returns `batch_size / shard.count`.
        fingerprint: hash of all rows and their order; a state fits only the same data.
        wait_seconds: seconds that `next` has waited so far for batches that were not ready.
    """

    def __init__(
        self,
        dataset: Dataset,
        spans: Spans,
        rows: PackedRows,
        *,
        seq_len: int,
        batch_size: int,
        pad_id: int,
        sources: tuple[tuple[str, ...], Int64[np.ndarray, " D"]],
        seed: int = 0,
        shard: Shard | None = None,
    ):
        shard = shard or Shard()
        self.sources, source_of_document = sources
        dtype = source_dtype(len(self.sources))
        self._source = None if dtype is None else source_of_document.astype(dtype)
        self._own = shard.rows_of(batch_size)
        self._skipped = shard.index * self._own
        self.report = _report(dataset, spans, rows, seq_len, batch_size)
        self.batch_size = batch_size
        self.fingerprint = _fingerprint(dataset, spans, rows, seq_len, seed)
        self._dataset, self._spans, self._rows = dataset, spans, rows
        self._seq_len, self._pad_id, self._seed = seq_len, pad_id, seed
        self._row = 0  # of the stream: the first one of the next batch
        self._order = (-1, np.zeros(0, np.int64))  # the last epoch asked for, and its row order
        self.wait_seconds = 0.0
        self._made: deque[Future[Batch]] = deque()
        self._thread = Thread("loader")

    def __next__(self) -> Batch:
        return self.next(timeout=math.inf)

    def next(self, *, timeout: float) -> Batch:
        """Return the next batch.

        Raises:
            TimeoutError: it did not come in `timeout` seconds; names its documents.
        """
        while len(self._made) <= AHEAD:
            row = self._row + len(self._made) * self.batch_size
            self._made.append(self._thread.submit(self._make, row))
        begun = time.perf_counter()
        try:
            batch = self._made[0].result(min(timeout, threading.TIMEOUT_MAX))
        except BaseException as error:
            # Reading a file may end in a TimeoutError, too.
            stalled = isinstance(error, TimeoutError) and not self._made[0].done()
            self._forget()
            if not stalled:
                raise
            names = self.documents(self.state())
            raise TimeoutError(
                f"the data made no batch in {timeout} seconds; it was to read {names[0]}"
                + (f" .. {names[-1]}" if len(names) > 1 else "")
            ) from error
        finally:
            self.wait_seconds += time.perf_counter() - begun
        self._made.popleft()
        self._row += self.batch_size
        return batch

    def documents(self, state: dict[str, Any]) -> list[str]:
        """Return "file:line" of each document, on all hosts, of the batch drawn at `state`."""
        first = state["row"]
        names: dict[str, None] = {}
        for place in range(first, first + self.batch_size):
            epoch, index = divmod(place, len(self._rows))
            row = self._epoch_order(epoch)[index]
            start, end = self._rows.offsets[row : row + 2]
            for d in self._spans.document[self._rows.spans[start:end]]:
                file = self._dataset.files[self._dataset.file[d]].file
                names[f"{file}:{self._dataset.line[d]}"] = None
        return list(names)

    @property
    def epoch(self) -> float:
        """Passes over the data so far, as a fraction."""
        return self._row / len(self._rows)

    @property
    def lengths(self) -> Int64[np.ndarray, " P"]:
        """Tokens of every span of an epoch."""
        return self._spans.length

    def one_epoch(self) -> Iterator[Batch]:
        """Yield every row once, in batches; rows that fill the last batch up have no loss."""
        for row in range(0, len(self._rows), self.batch_size):
            batch = self._make(row)
            first = row + self._skipped
            batch.loss_mask[max(0, len(self._rows) - first) :] = 0
            yield batch

    def state(self) -> dict[str, Any]:
        """Return the position of the next batch, small and fit for JSON."""
        return {"row": self._row, "fingerprint": self.fingerprint}

    def restore(self, state: dict[str, Any]) -> None:
        """Go to a position: the next batch is the one that was next when the state was taken.

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
        """End the background thread."""
        self._forget()
        self._thread.end()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make(self, row: int) -> Batch:
        first = row + self._skipped
        chosen = np.array([self._row_at(i) for i in range(first, first + self._own)], np.int64)
        return fill(
            self._dataset,
            self._spans,
            self._rows,
            chosen,
            seq_len=self._seq_len,
            pad_id=self._pad_id,
            sources=self._source,
        )

    def _row_at(self, place: int) -> int:
        epoch, index = divmod(place, len(self._rows))
        if self._order[0] != epoch:
            self._order = (epoch, self._epoch_order(epoch))
        return int(self._order[1][index])

    def _epoch_order(self, epoch: int) -> Int64[np.ndarray, " R"]:
        # 1 sets the key apart from that of the packing's shuffle, which is the seed alone.
        return permutation(len(self._rows), self._seed, 1, epoch)

    def _forget(self) -> None:
        """Drop the batches that were made ahead."""
        for future in self._made:
            future.cancel()
        self._made.clear()


def _report(
    dataset: Dataset, spans: Spans, rows: PackedRows, seq_len: int, batch_size: int
) -> Report:
    """Count documents, tokens and rows, from the rows themselves."""
    taken = np.bincount(spans.document, minlength=len(dataset.line)) > 0
    _, first = np.unique(spans.start, return_index=True)  # a weight may repeat a span
    apart = np.bincount(spans.document[first])
    per_row = np.add.reduceat(spans.length[rows.spans], rows.offsets[:-1])
    repeated, places = _repeats(dataset, np.flatnonzero(taken))
    documents = int(taken.sum())
    return Report(
        files=dataset.files,
        documents=documents,
        split=int((apart > 1).sum()),
        rows=len(rows),
        seq_len=seq_len,
        batch_size=batch_size,
        tokens=int(spans.length.sum()),
        loss_tokens=int(spans.targets.sum()),
        tail=int(per_row.min()),
        left_out=len(dataset.line) - documents - len(spans.dropped),
        repeated=repeated,
        first_repeat=places,
        broken=dataset.broken,
        dropped=spans.dropped,
        truncated=spans.truncated,
    )


def _repeats(dataset: Dataset, documents: Int64[np.ndarray, " n"]) -> tuple[int, str]:
    """Return the number of documents that repeat an earlier one, and the places of the first."""
    _, first, same = np.unique(dataset.hashes[documents], return_index=True, return_inverse=True)
    again = np.flatnonzero(first[same] != np.arange(len(documents)))
    if not len(again):
        return 0, ""

    def place(number: int) -> str:
        document = documents[number]
        return f"{dataset.files[dataset.file[document]].file}:{dataset.line[document]}"

    number = int(again[0])
    return len(again), f"{place(number)} is {place(int(first[same[number]]))} again"


def _fingerprint(dataset: Dataset, spans: Spans, rows: PackedRows, seq_len: int, seed: int) -> str:
    digest = hashlib.blake2b(f"{seq_len} {seed} {dataset.digest}".encode(), digest_size=8)
    for array in (spans.start, spans.length, spans.continues, rows.spans, rows.offsets):
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()
