"""What became of the data: every row that was read is in the report once."""

import collections
import dataclasses

_SHOWN = 3  # problems of one kind and file that are named; the rest are counted


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """A row that did not go into training as it is.

    Attributes:
        file: path as it was given.
        line: line of the file on which the row begins, from 1.
        reason: why, in a few words.
    """

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclasses.dataclass(frozen=True, slots=True)
class FileReport:
    """One file: `rows` were read, `documents` of them are usable, the others broken.

    Attributes:
        file: path as it was given.
        formats: how many documents of each format (formats.py).
        rows: rows read.
        documents: rows that became documents; `rows - documents` are broken.
    """

    file: str
    formats: dict[str, int]
    rows: int
    documents: int

    def __str__(self) -> str:
        formats = ", ".join(f"{count:,} {name}" for name, count in self.formats.items())
        return f"{self.file}: {self.rows:,} rows ({formats}, {self.rows - self.documents:,} broken)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """The data of a run: rows read = `documents` + `broken` + `dropped` + `left_out`.

    Attributes:
        files: one entry a file.
        documents: documents in training, each in exactly one row, but split ones.
        split: of these, raw texts longer than a row, divided into several pieces.
        rows: packed rows of `seq_len` tokens.
        seq_len: length of a row.
        tokens: tokens in training, without padding.
        loss_tokens: tokens that are predicted: the sum of the loss mask over all rows.
        tail: tokens in the emptiest row, the flushed remainder of the packing.
        left_out: documents that a weight below 1 or the validation set takes away.
        broken: rows that could not be used.
        dropped: documents left out because of their length.
        truncated: documents cut to `seq_len`; counted in `documents`.
    """

    files: tuple[FileReport, ...]
    documents: int
    split: int
    rows: int
    seq_len: int
    tokens: int
    loss_tokens: int
    tail: int
    left_out: int
    broken: tuple[Problem, ...]
    dropped: tuple[Problem, ...]
    truncated: tuple[Problem, ...]

    @property
    def efficiency(self) -> float:
        """Share of the rows' places that hold a token, the last row included."""
        return self.tokens / (self.rows * self.seq_len)

    @property
    def efficiency_before_tail(self) -> float:
        """The same without the emptiest row, which only holds what was left."""
        if self.rows == 1:
            return self.efficiency
        return (self.tokens - self.tail) / ((self.rows - 1) * self.seq_len)

    def __str__(self) -> str:
        truncated, dropped, broken = map(len, (self.truncated, self.dropped, self.broken))
        left_out = f", {self.left_out:,} left out" if self.left_out else ""
        without = f", {self.efficiency_before_tail:.1%} without the emptiest row"
        without = without if self.rows > 1 else ""
        return (
            f"{self.documents:,} documents ({self.split:,} split, {truncated:,} truncated,"
            f" {dropped:,} dropped, {broken:,} broken{left_out}), {self.tokens:,} tokens,"
            f" {self.loss_tokens:,} with loss, in {self.rows:,} rows of {self.seq_len:,}"
            f" ({self.efficiency:.1%} full{without})"
        )

    def notes(self) -> list[str]:
        """Returns one line per file and kind of problem, with the first rows concerned."""
        return [
            line
            for kind, problems in (
                ("broken row(s) skipped", self.broken),
                ("document(s) dropped", self.dropped),
                ("document(s) truncated", self.truncated),
            )
            for line in _by_file(kind, problems)
        ]


def _by_file(kind: str, problems: tuple[Problem, ...]) -> list[str]:
    by_file = collections.defaultdict(list)
    for problem in problems:
        by_file[problem.file].append(problem)
    lines = []
    for file, found in by_file.items():
        shown = "; ".join(f"line {p.line}: {p.reason}" for p in found[:_SHOWN])
        more = f"; and {len(found) - _SHOWN:,} more" if len(found) > _SHOWN else ""
        lines.append(f"{file}: {len(found):,} {kind}: {shown}{more}")
    return lines
