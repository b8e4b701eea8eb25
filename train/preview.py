"""`python -m train.preview --data ...`: show the packed rows that a run would train on.

Rows are shown as text, with tokens that have loss in color and a mark at each document's start; the
first tokens of a row as a table with their ids; then the report that a run logs about its data.
Needs no accelerator.
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated

import numpy as np
import tyro

from models.cli import fail, interruptible, parse
from models.terminal import escape_control
from models.tokenizer import Tokenizer, load_tokenizer
from train.config.bounds import at_least, check_bounds
from train.config.command_line import check_complete, parse_flags
from train.config.sections import DataConfig, chosen
from train.data.loader import Loader
from train.data.pack.packing import Batch
from train.run.build import open_packed
from train.run.inputs import default_tokenizer, read_model

LOSS, MARK, PLAIN = "\033[32m", "\033[1;34m", "\033[0m"
_BAR_COLUMNS = 40  # of the longest bar of the histogram


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """Show the rows of a run with the same data, tokenizer, row length and seed."""

    config: Annotated[str | None, chosen("FILE|DIR")] = None
    """File of train.main's --config: its data, tokenizer (also that of its model), row length and
    seed are taken, and the other flags override them."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)

    tokenizer: Annotated[str, tyro.conf.arg(metavar="byte|FILE|DIR")] = "byte"
    """Tokenizer, as in train.main."""

    seq_len: int = 512
    """Tokens in a packed row."""

    seed: int = 0
    """Seed of the order of rows."""

    rows: Annotated[int, at_least(0)] = 1
    """Number of rows to show, from the first of the run."""

    tokens: Annotated[int, at_least(0)] = 40
    """Number of tokens of each row to show as a table."""

    color: bool = dataclasses.field(default_factory=lambda: sys.stdout.isatty())
    """Color tokens that have loss; without color they are between « and ». By default on a
    terminal."""

    all: bool = False
    """List every dropped, truncated and broken row."""

    def __post_init__(self):
        """Check the ranges of the flags."""
        check_bounds(self)


@interruptible
def main(argv: Sequence[str] | None = None) -> int:
    """Print the preview; return the exit status: 0; 1 for bad data; 2 for wrong flags."""
    try:
        given = sys.argv[1:] if argv is None else argv
        config = parse(PreviewConfig, given, "train.preview", default=_defaults(given))
        if config.config is not None and config.data.files is None:
            check_complete(parse_flags([f"--config={config.config}"]))
    except (ValueError, OSError) as error:
        return fail(error, 2)
    try:
        tokenizer = load_tokenizer(config.tokenizer)
        with open_packed(
            config.data,
            config.data.files,
            tokenizer,
            hold_out=config.data.hold_out,
            seq_len=config.seq_len,
            batch_size=1,
            seed=config.seed,
        ) as loader:
            for line in _lines(config, tokenizer, loader):
                print(line)
        sys.stdout.flush()
    except BrokenPipeError:
        raise  # `interruptible` handles it
    except (ValueError, OSError) as error:
        return fail(error, 1)
    return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _File:
    config: str | None = None


def _defaults(argv: Sequence[str]) -> PreviewConfig | None:
    """Return the values of --config; None without it."""
    file = parse(_File, argv, "train.preview", ignore_unknown=True).config
    if file is None:
        return None
    run = parse_flags([f"--config={file}"])
    weights = read_model(run.model)[1] if run.model else None
    return PreviewConfig(
        data=run.data,
        tokenizer=run.tokenizer or default_tokenizer(run.model or "nano", weights),
        seq_len=run.seq_len,
        seed=run.seed,
    )


def show_row(batch: Batch, row: int, tokenizer: Tokenizer, *, color: bool) -> str:
    """Return a row as text: documents marked, tokens with loss in color or between « and ».

    Control characters in the text are escaped.
    """
    ids = batch.segment_ids[row]
    has_loss = _has_loss(batch, row)
    on, off = (LOSS, PLAIN) if color else ("«", "»")
    mark, unmark = (MARK, PLAIN) if color else ("", "")
    parts = []
    for number in range(1, int(ids.max()) + 1):
        [at] = np.nonzero(ids == number)
        parts.append(f"{mark}--- document {number}: {len(at):,} tokens{unmark}\n")
        edges = np.flatnonzero(np.diff(has_loss[at])) + 1
        for span in np.split(at, edges):
            text = escape_control(tokenizer.decode(batch.tokens[row, span].tolist()))
            parts.append(f"{on}{text}{off}" if has_loss[span[0]] else text)
        parts.append("\n")
    padding = int((ids == 0).sum())
    return "".join(parts) + f"{mark}--- {padding:,} tokens of padding{unmark}"


def show_table(batch: Batch, row: int, tokenizer: Tokenizer, count: int) -> Iterator[str]:
    """Yield the first tokens of a row, one a line: index, document, position, id, loss, text."""
    has_loss = _has_loss(batch, row)
    yield f"{'index':>6} {'document':>8} {'position':>8} {'id':>6} loss text"
    for t in range(min(count, int((batch.segment_ids[row] > 0).sum()))):
        token = int(batch.tokens[row, t])
        where = f"{t:>6} {batch.segment_ids[row, t]:>8} {batch.positions[row, t]:>8} {token:>6}"
        yield f"{where} {'yes' if has_loss[t] else '':<4} {tokenizer.decode([token])!r}"


def histogram(lengths: np.ndarray) -> Iterator[str]:
    """Yield the number of documents by length, in powers of two."""
    counts = np.bincount(np.ceil(np.log2(np.maximum(lengths, 1))).astype(int))
    for power, count in enumerate(counts):
        if count:
            bar = "#" * max(1, round(_BAR_COLUMNS * int(count) / int(counts.max())))
            least = 2 ** (power - 1) + 1 if power else 1
            yield f"  {least:>9,} .. {2**power:>9,} tokens {count:>9,} {bar}"


def _lines(config: PreviewConfig, tokenizer: Tokenizer, loader: Loader) -> Iterator[str]:
    yield escape_control(f"tokenizer {tokenizer.name}")
    for number in range(min(config.rows, loader.report.rows)):
        batch = next(loader)
        yield f"=== row {number + 1} of {loader.report.rows:,} in the order of training"
        yield show_row(batch, 0, tokenizer, color=config.color)
        yield from show_table(batch, 0, tokenizer, config.tokens)
    report = loader.report
    first, *rest = report.lines()
    yield from (escape_control(line) for line in (f"=== {first}", *rest))
    saved = 1 - _unmasked_fraction(loader)
    yield f"the document mask saves {saved:.1%} of the attention work of causal rows"
    yield "documents, after splitting, by length:"
    yield from histogram(loader.lengths)
    if config.all:
        for kind in ("broken", "dropped", "truncated"):
            for problem in getattr(report, kind):
                yield escape_control(f"{kind}: {problem}")


def _unmasked_fraction(loader: Loader) -> float:
    """Return the query-key pairs inside documents as a fraction of those of causal rows."""
    lengths = loader.lengths.astype(np.float64)
    full = loader.report.seq_len * (loader.report.seq_len + 1) / 2 * loader.report.rows
    return float((lengths * (lengths + 1) / 2).sum() / full)


def _has_loss(batch: Batch, row: int) -> np.ndarray:
    """Return a flag for each token that has loss; the mask is one index before its token."""
    same = np.diff(batch.segment_ids[row], prepend=0) == 0
    return np.concatenate([[0], batch.loss_mask[row, :-1]]).astype(bool) & same


if __name__ == "__main__":
    sys.exit(main())
