"""Data report: every row that was read is in it once, and nothing is left out in silence."""

import collections
import dataclasses
import re

from models.terminal import counted

RAW = ("pretrain", "tokens", "text")
"""Formats (files/formats.py) of raw text, and of ids that may be anything; all others are chats."""

_LINES = 3  # line numbers that are named of problems of one kind
_KINDS = 6  # kinds of problems that are named for a file; the rest are counted
_KEYS = 12  # unread keys that are named for a file; the rest are counted


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """A row that is not trained on as it is."""

    file: str  # path as it was given
    line: int  # line of the file on which the row begins, from 1
    size: int  # bytes of a row that could not be used; 0 for others
    reason: str  # why, in a few words

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FileReport:
    """Counts for one file."""

    file: str  # path as it was given
    rows: int  # rows read
    documents: int  # rows that became documents; `rows - documents` are broken
    formats: dict[str, int]  # number of documents of each format (formats.py)
    # for each key that is not read, the number of rows that have it
    unread: dict[str, int] = dataclasses.field(default_factory=dict)
    # number of times that each remark of formats.py was made
    remarks: dict[str, int] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        counts = [f"{count:,} in the format {name}" for name, count in self.formats.items()]
        counts.append(f"{self.rows - self.documents:,} broken")
        return f"{self.file}: {counted(self.rows, 'row')}: {', '.join(counts)}"

    def notes(self) -> list[str]:
        """Return a line for the keys that are not read, and one for each remark."""
        found = []
        if self.unread:
            keys = [f"{key!r} in {count:,} row(s)" for key, count in sorted(self.unread.items())]
            more = f" and {len(keys) - _KEYS:,} more" if len(keys) > _KEYS else ""
            found.append(f"keys not read: {', '.join(keys[:_KEYS])}{more}")
        found += [f"{count:,} {remark}" for remark, count in self.remarks.items()]
        return [f"{self.file}: {note}" for note in found]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """The data of a run: rows read = `documents` + `broken` + `dropped` + `left_out`."""

    files: tuple[FileReport, ...]  # one entry a file
    documents: int  # documents in training, each in exactly one row, but split ones
    split: int  # of these, raw texts longer than a row, divided into several spans
    rows: int  # packed rows of `seq_len` tokens
    seq_len: int  # tokens of a row
    batch_size: int  # rows of a batch over all hosts
    tokens: int  # tokens in training, without padding
    loss_tokens: int  # tokens that are predicted: the sum of the loss mask over all rows
    tail: int  # tokens in the emptiest row, the last one of the packing
    left_out: int  # documents that a weight below 1 or the validation set takes away
    repeated: int  # documents with the same tokens as an earlier one
    first_repeat: str  # places of the first of these, and of the earlier one
    broken: tuple[Problem, ...]  # rows that could not be used
    dropped: tuple[Problem, ...]  # documents left out because of their length
    truncated: tuple[Problem, ...]  # documents cut to `seq_len`; counted in `documents`

    @property
    def has_chats(self) -> bool:
        """True if a file has rows in one of the chat formats."""
        return any(name not in RAW for file in self.files for name in file.formats)

    @property
    def efficiency(self) -> float:
        """Share of the rows' places that hold a token, the last row included."""
        return self.tokens / (self.rows * self.seq_len)

    @property
    def efficiency_before_tail(self) -> float:
        """The same without the emptiest row, which only holds the rest."""
        if self.rows == 1:
            return self.efficiency
        return (self.tokens - self.tail) / ((self.rows - 1) * self.seq_len)

    def __str__(self) -> str:
        truncated, dropped, broken = map(len, (self.truncated, self.dropped, self.broken))
        left_out = f", {self.left_out:,} left out" if self.left_out else ""
        without = f", {self.efficiency_before_tail:.1%} without the emptiest row"
        without = without if self.rows > 1 else ""
        return (
            f"{counted(self.documents, 'document')} ({self.split:,} split, {truncated:,} truncated,"
            f" {dropped:,} dropped, {broken:,} broken{left_out}), {self.tokens:,} tokens,"
            f" {self.loss_tokens:,} with loss, in {counted(self.rows, 'row')} of {self.seq_len:,}"
            f" ({self.efficiency:.1%} full{without})"
        )

    def lines(self) -> list[str]:
        """Return the whole report, as the log of a run and `train.preview` print it."""
        return [str(self), *map(str, self.files), *self.notes()]

    def notes(self) -> list[str]:
        """Return a line for everything that is not trained on as it is, and for repeats."""
        notes = [note for file in self.files for note in file.notes()]
        for kind, problems in (
            ("broken row(s) skipped", self.broken),
            ("document(s) dropped", self.dropped),
            ("document(s) truncated", self.truncated),
        ):
            notes += _by_file(kind, problems)
        if self.repeated:
            notes.append(
                f"{self.repeated:,} document(s) repeat an earlier one: {self.first_repeat}"
            )
        if self.batch_size > self.rows:
            notes.append(
                f"a batch has {self.batch_size:,} rows and the data {self.rows:,}: every batch has"
                f" each row {self.batch_size / self.rows:.3g} times; lower --batch_size"
            )
        return notes


def _by_file(kind: str, problems: tuple[Problem, ...]) -> list[str]:
    """Return one line a file, with problems grouped by reason, whatever the numbers in it."""
    by_file = collections.defaultdict(lambda: collections.defaultdict(list))
    for problem in problems:
        by_file[problem.file][re.sub(r"[\d,]+", "0", problem.reason)].append(problem)
    lines = []
    for file, by_reason in by_file.items():
        groups = sorted(by_reason.values(), key=len, reverse=True)
        size = sum(problem.size for group in groups for problem in group)
        shown = "; ".join(map(_group, groups[:_KINDS]))
        rest = groups[_KINDS:]
        more = f"; {sum(map(len, rest)):,} for other reasons (train.preview --all)" if rest else ""
        bytes_ = f", {size:,} bytes" if size else ""
        count = sum(map(len, groups))
        lines.append(f"{file}: {count:,} {kind}{bytes_}: {shown}{more}")
    return lines


def _group(group: list[Problem]) -> str:
    numbers = ", ".join(str(problem.line) for problem in group[:_LINES])
    more = ", ..." if len(group) > _LINES else ""
    alike = all(problem.reason == group[0].reason for problem in group)
    count = f"{len(group):,} x" if alike else f"{len(group):,}, the first:"
    return f"{count} {group[0].reason} (line {numbers}{more})"
