"""Random rows of every format: no more and no less than their messages, and their own loss flags.

The rows go through files, tokens, cache and packing; their tokens are decoded from packed batches.
"""

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from models.tokenizer import load_tokenizer
from tests.train.data.generator import Maker, merged
from train.data.open import open_data
from train.data.tokens.cache import ReadOptions

SPM = Path(__file__).parents[2] / "data" / "tokenizer_tiny_spm" / "tokenizer.model"


def packed_documents(loader, tokenizer) -> Counter:
    """Decode every document of an epoch into (text, trained) segments, and count them."""
    found = Counter()
    for batch in loader.one_epoch():
        for row in range(len(batch.tokens)):
            ids = batch.segment_ids[row]
            for number in range(1, ids.max() + 1):
                at = np.flatnonzero(ids == number)
                tokens = batch.tokens[row, at]
                # The mask is at the position before the token that it belongs to.
                trained = np.concatenate([[0], batch.loss_mask[row, at[:-1]]]) > 0
                assert tokens[0] == tokenizer.bos_id and not trained[0]
                edges = np.flatnonzero(np.diff(trained[1:])) + 2
                parts = [
                    (tokenizer.decode(tokens[span].tolist()), bool(trained[span[0]]))
                    for span in np.split(np.arange(len(tokens)), edges)
                ]
                parts[0] = (parts[0][0].removeprefix("<s>"), bool(trained[1]))
                found[tuple(part for part in parts if part[0])] += 1
    return found


def check(count: int, directory: Path, tokenizer) -> None:
    maker = Maker(seed=count)
    rows = [maker.row() for _ in range(count)]
    assert sum(expected is None for _, expected in rows) < count / 20
    half = count // 2
    lines = [json.dumps(row, ensure_ascii=False) for row, _ in rows[:half]]
    (directory / "a.jsonl").write_text("\n".join(lines))
    array = json.dumps([row for row, _ in rows[half:]], indent=1)
    (directory / "b.json.gz").write_bytes(gzip.compress(array.encode()))
    options = dict(seq_len=4096, batch_size=1)
    reading = ReadOptions(cache=directory / "cache", workers=1, chunk=1 << 14)
    paths = [directory / "a.jsonl", directory / "b.json.gz"]
    with open_data(paths, tokenizer, reading=reading, **options) as loader:
        report, found = loader.report, packed_documents(loader, tokenizer)
    usable = [merged(expected) for _, expected in rows if expected is not None]
    learned = [tuple(parts) for parts in usable if any(flag for _, flag in parts)]
    # Nothing unsaid: rows that are refused, and chats with nothing to learn, are in the report.
    assert len(report.broken) == count - len(usable)
    assert len(report.dropped) == len(usable) - len(learned)
    assert report.documents == len(learned) and not report.truncated
    assert found == Counter(learned)
    loss = sum(
        report.files[i].remarks.get("answer(s) without loss, as the data ask", 0) for i in (0, 1)
    )
    chats = [parts for parts in usable if parts[0][1] is False]
    assert loss == sum(_untrained_answers(parts) for parts in chats)


def _untrained_answers(parts: list[tuple[str, bool]]) -> int:
    """Count the answers without loss: their opening is followed by text in the same segment."""
    opening = "<|im_start|>assistant\n"
    return sum(text.count(opening) - text.endswith(opening) for text, flag in parts if not flag)


@pytest.mark.parametrize("spec", ["byte", SPM], ids=["byte", "spm"])
def test_packed_tokens_are_the_messages_of_the_rows(tmp_path, spec):
    """500 rows."""
    check(500, tmp_path, load_tokenizer(spec))


@pytest.mark.slow
def test_packed_tokens_are_the_messages_of_10_000_rows(tmp_path):
    check(10_000, tmp_path, load_tokenizer(SPM))
