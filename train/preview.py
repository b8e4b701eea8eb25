"""`python -m train.preview --data ...`: what a run would train on, before it does.

Shows rows as text with the tokens that are learned in colour, each document's beginning marked, the
first tokens of a row as a table with their ids, and a report. Needs no accelerator.
"""

import dataclasses
import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from models.tokenizer import Tokenizer, load_tokenizer
from train.config.cli import fail, parse
from train.config.sections import DataConfig, require
from train.data import Batch, Loader, default_cache, open_data

LEARNED, MARK, PLAIN = "\033[32m", "\033[1;34m", "\033[0m"
_BARS = 40  # columns of the longest bar of the histogram
_LISTED = 20  # of a kind of problem; --all lists every one


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """Shows what a run with the same data, tokenizer, row length and seed trains on."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)

    tokenizer: Annotated[str, tyro.conf.arg(metavar="byte|FILE|DIR")] = "byte"
    """As for train.main."""

    seq_len: int = 512
    """Tokens in a packed row."""

    seed: int = 0
    """Of the order."""

    rows: int = 1
    """How many rows to show, the first of the run; all where there are fewer."""

    tokens: int = 40
    """How many tokens of each row to show as a table."""

    color: bool = sys.stdout.isatty()
    """Colour the tokens that are learned; without, they stand between « and »."""

    all: bool = False
    """List every dropped, truncated and broken row, and not only the first 20 of each."""

    def __post_init__(self):
        """Checks ranges."""
        require(self.rows >= 0, "--rows", self.rows, "at least 0")
        require(self.tokens >= 0, "--tokens", self.tokens, "at least 0")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the preview and returns the exit status: 0; 1 for bad data; 2 for wrong flags."""
    try:
        given = sys.argv[1:] if argv is None else argv
        config = parse(PreviewConfig, given, "train.preview")
    except ValueError as error:
        return fail(error, 2)
    if isinstance(sys.stdout, io.TextIOWrapper):  # what a terminal cannot show ends nothing
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        tokenizer = load_tokenizer(config.tokenizer)
        with _open(config, tokenizer) as loader:
            for line in _lines(config, tokenizer, loader):
                print(line)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe, `| head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor is the rest for it
    except (ValueError, OSError) as error:
        return fail(error, 1)
    return 0


def show_row(batch: Batch, row: int, tokenizer: Tokenizer, *, color: bool) -> str:
    """A row as text: documents marked, learned tokens in colour or between « and »."""
    ids = batch.segment_ids[row]
    learned = _learned(batch, row)
    on, off = (LEARNED, PLAIN) if color else ("«", "»")
    mark, unmark = (MARK, PLAIN) if color else ("", "")
    said = []
    for number in range(1, int(ids.max()) + 1):
        [at] = np.nonzero(ids == number)
        said.append(f"{mark}--- document {number}: {len(at):,} tokens{unmark}\n")
        edges = np.flatnonzero(np.diff(learned[at])) + 1
        for stretch in np.split(at, edges):
            text = tokenizer.decode(batch.tokens[row, stretch].tolist())
            said.append(f"{on}{text}{off}" if learned[stretch[0]] else text)
        said.append("\n")
    padding = int((ids == 0).sum())
    return "".join(said) + f"{mark}--- {padding:,} places of padding{unmark}"


def show_table(batch: Batch, row: int, tokenizer: Tokenizer, count: int) -> Iterator[str]:
    """The first tokens of a row, one a line: place, document, position, id, learned, text."""
    learned = _learned(batch, row)
    yield f"{'place':>6} {'document':>8} {'position':>8} {'id':>6} learned text"
    for t in range(min(count, int((batch.segment_ids[row] > 0).sum()))):
        token = int(batch.tokens[row, t])
        place = f"{t:>6} {batch.segment_ids[row, t]:>8} {batch.positions[row, t]:>8} {token:>6}"
        yield f"{place} {'yes' if learned[t] else '':<7} {tokenizer.decode([token])!r}"


def histogram(lengths: np.ndarray) -> Iterator[str]:
    """Documents by length, in powers of two."""
    counts = np.bincount(np.ceil(np.log2(np.maximum(lengths, 1))).astype(int))
    for power, count in enumerate(counts):
        if count:
            bar = "#" * max(1, round(_BARS * int(count) / int(counts.max())))
            least = 2 ** (power - 1) + 1 if power else 1
            yield f"  {least:>9,} .. {2**power:>9,} tokens {count:>9,} {bar}"


def _lines(config: PreviewConfig, tokenizer: Tokenizer, loader: Loader) -> Iterator[str]:
    for number in range(min(config.rows, loader.report.rows)):
        batch = next(loader)
        yield f"=== row {number + 1} of {loader.report.rows:,} in the order of training"
        yield show_row(batch, 0, tokenizer, color=config.color)
        yield from show_table(batch, 0, tokenizer, config.tokens)
    report = loader.report
    yield f"=== {report}"
    yield from map(str, report.files)
    tail = f"{report.efficiency_before_tail:.2%} without the emptiest row"
    yield f"packing efficiency {report.efficiency:.2%}, {tail}"
    share = report.loss_tokens / report.tokens
    yield f"loss tokens {report.loss_tokens:,} of {report.tokens:,} ({share:.1%})"
    saved = 1 - _pairs_share(loader)
    yield f"attention work that the document mask saves, against causal rows: {saved:.1%}"
    yield "pieces of documents by length:"
    yield from histogram(loader.lengths)
    for kind in ("broken", "dropped", "truncated"):
        found = getattr(report, kind)
        shown = found if config.all else found[:_LISTED]
        yield from (f"{kind}: {problem}" for problem in shown)
        if len(shown) < len(found):
            yield f"{kind}: and {len(found) - len(shown):,} more (--all lists them)"


def _pairs_share(loader: Loader) -> float:
    """Query-key pairs inside documents, as a share of those of full causal rows."""
    lengths = loader.lengths.astype(np.float64)
    full = loader.report.seq_len * (loader.report.seq_len + 1) / 2 * loader.report.rows
    return float((lengths * (lengths + 1) / 2).sum() / full)


def _learned(batch: Batch, row: int) -> np.ndarray:
    """Which tokens are predicted with loss: the mask is at the place before each."""
    same = np.diff(batch.segment_ids[row], prepend=0) == 0
    return np.concatenate([[0], batch.loss_mask[row, :-1]]).astype(bool) & same


def _open(config: PreviewConfig, tokenizer: Tokenizer) -> Loader:
    return open_data(
        config.data.files,
        tokenizer,
        seq_len=config.seq_len,
        batch_size=1,
        seed=config.seed,
        strict=config.data.strict,
        packing=config.data.packing,
        too_long=config.data.too_long,
        hold_out=config.data.hold_out,
        cache=Path(config.data.cache) if config.data.cache else default_cache(),
    )


if __name__ == "__main__":
    sys.exit(main())
