"""`python -m train.data.bench --data ... --tokenizer ...`: speed of tokenizing and loading.

Three figures, in tokens a second, measured in turn as often as asked, since other work on the
machine slows each of them down:

raw     the tokenizer alone, `encode_batch`, its fastest call: the same texts that the template has
        it tokenize, read and rendered before, in as many processes, which have started and hold
        the tokenizer already; with every newline after an answer, which a build tokenizes once
build   from the files to a complete cache, with the start of the processes
load    from the cache to packed batches: opening it, checking every byte, packing, one epoch
"""

import dataclasses
import itertools
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

from models.cli import fail, parse
from models.tokenizer import Tokenizer, load_tokenizer
from train.config.bounds import above, check_bounds, require
from train.data.files.examples import Ids
from train.data.files.fields import RowError
from train.data.files.formats import recognize
from train.data.files.records import Record, read_records
from train.data.files.template import render
from train.data.open import open_data
from train.data.pack.mixture import parse_source
from train.data.tokens.cache import ReadOptions
from train.data.tokens.dataset import tokenize

_TEXTS = 5_000  # for one call of the raw tokenizer: about as many as encode.py has


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Measure the tokens a second of the tokenizer alone, of building the cache, of loading."""

    data: tuple[str, ...]
    """Files, as for train.main."""

    tokenizer: str = "byte"
    """As for train.main."""

    seq_len: int = 4096
    """Tokens in a packed row."""

    workers: Annotated[int, above(0)] = len(os.sched_getaffinity(0))
    """Number of processes."""

    repeat: Annotated[int, above(0)] = 3
    """Number of measurements of each figure."""

    def __post_init__(self):
        """Check the ranges."""
        check_bounds(self)
        require(len(self.data) > 0, "--data", "nothing", "at least one file")


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each measurement; return 0, or 1 for bad data, 2 for wrong flags."""
    try:
        config = parse(BenchConfig, sys.argv[1:] if argv is None else argv, "train.data.bench")
    except ValueError as error:
        return fail(error, 2)
    try:
        for line in measure(config):
            print(line, flush=True)
    except (ValueError, OSError) as error:
        return fail(error, 1)
    return 0


def measure(config: BenchConfig) -> Iterator[str]:
    """Yield the lines of the table."""
    tokenizer = load_tokenizer(config.tokenizer)
    files = [file for source in map(parse_source, config.data) for file in source.files]
    texts = list(_texts(files))
    parts = [texts[i :: 8 * config.workers] for i in range(8 * config.workers)]
    yield f"{len(texts):,} texts, {config.workers} processes"
    yield f"{'':>10} {'tokens':>13} {'tokens/s':>11} {'of raw':>7} {'CPU s':>7} {'of raw':>7}"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(config.workers, context, _hold, (tokenizer,)) as pool:
        list(pool.map(_count, [texts[:1]] * 8 * config.workers))  # all have started
        for _ in range(config.repeat):
            raw = _Timed()
            counts = list(pool.map(_count, parts))
            tokens, busy = sum(n for n, _ in counts), sum(cpu for _, cpu in counts)
            raw.stop(busy)
            yield raw.line("raw", tokens, raw)
            with tempfile.TemporaryDirectory() as directory:
                build = _Timed()
                reading = ReadOptions(cache=Path(directory), workers=config.workers)
                tokenize(files, tokenizer, reading)
                yield build.stop().line("build", tokens, raw)
                load = _Timed()
                seen = _load(config, tokenizer, reading)
                yield load.stop().line("load", seen, raw)


class _Timed:
    """Wall time, and CPU time of this process and of the processes that it has waited for."""

    def __init__(self):
        self.wall, self.cpu = -time.perf_counter(), -_cpu()

    def stop(self, cpu: float | None = None) -> "_Timed":
        self.wall += time.perf_counter()
        self.cpu = self.cpu + _cpu() if cpu is None else cpu
        return self

    def line(self, name: str, tokens: int, raw: "_Timed") -> str:
        shares = f"{raw.wall / self.wall:>7.1%} {self.cpu:>7.1f} {self.cpu / raw.cpu:>7.1%}"
        speed, its = tokens / self.wall, shares if name != "load" else ""
        return f"{name:>10} {tokens:>13,} {speed:>11,.0f} {its}".rstrip()


def _cpu() -> float:
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, who))


def _load(config: BenchConfig, tokenizer: Tokenizer, reading: ReadOptions) -> int:
    with open_data(
        config.data, tokenizer, seq_len=config.seq_len, batch_size=1, reading=reading
    ) as loader:
        return sum(int((next(loader).segment_ids > 0).sum()) for _ in range(loader.report.rows))


def _texts(files: Sequence[Path]) -> Iterator[str]:
    for record in itertools.chain.from_iterable(map(read_records, files)):
        try:
            example = recognize(record.value).example if isinstance(record, Record) else None
        except RowError:
            continue
        if example is not None and not isinstance(example, Ids):
            yield from (text for text, _ in render(example))


_held: list[Tokenizer] = []


def _hold(tokenizer: Tokenizer) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _held.append(tokenizer)


def _count(texts: list[str]) -> tuple[int, float]:
    """Return the number of tokens of the texts, and the CPU time that they took."""
    begun = time.process_time()
    calls = (texts[at : at + _TEXTS] for at in range(0, len(texts), _TEXTS))
    tokens = sum(len(ids) for call in calls for ids in _held[0].encode_batch(call))
    return tokens, time.process_time() - begun


if __name__ == "__main__":
    sys.exit(main())
