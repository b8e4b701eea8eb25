"""The byte tokenizer, and a way to write data files."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from models.tokenizer import Tokenizer, load_tokenizer
from train.data.report import FileReport
from train.data.tokens.dataset import Dataset
from train.data.tokens.token_array import TokenArray


@pytest.fixture
def tokenizer() -> Tokenizer:
    """Bytes as ids 3..258 after <unk> 0, <s> 1, </s> 2; 263 <|im_end|> and 264 <|im_start|>."""
    return load_tokenizer("byte")


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, object], Path]:
    """Write a file of a name and content: bytes, str, or rows for .jsonl lines or an array."""

    def write_file(name: str, content: object) -> Path:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_bytes(content.encode())
        elif name.endswith(".jsonl"):
            lines = [json.dumps(row, ensure_ascii=False) for row in content]
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        else:
            path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
        return path

    return write_file


@pytest.fixture(scope="session")
def make_dataset() -> Callable[..., Dataset]:
    """Make a dataset without files."""
    return _make_dataset


def _make_dataset(
    documents: list[tuple[int, bool]], seed: int = 0, learn_from: int | None = None
) -> Dataset:
    """Documents of (length, splittable) with tokens that are all different, from 1.

    Random ones are trained on, or those from index `learn_from`.
    """
    lengths = [length for length, _ in documents]
    total = sum(lengths)
    trained = np.random.default_rng(seed).random(total) < 0.6
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    trained[offsets[:-1]] = False  # <s>
    trained[offsets[1:] - 1] = True  # so that every document has something to learn
    if learn_from is not None:
        trained = np.arange(total) >= learn_from
    ids = np.arange(1, total + 1, dtype=np.int32)
    signed = np.where(trained, ids, ~ids)
    return Dataset(
        tokens=TokenArray(np.split(signed, offsets[1:-1:3])),  # parts of three documents
        targets=np.array([trained[a + 1 : b].sum() for a, b in itertools.pairwise(offsets)]),
        offsets=offsets,
        splittable=np.array([flag for _, flag in documents], np.bool_),
        hashes=np.arange(len(lengths), dtype=np.uint64),
        file=np.zeros(len(lengths), np.int32),
        line=np.arange(1, len(lengths) + 1, dtype=np.int64),
        files=(FileReport(file="f", rows=len(lengths), documents=len(lengths), formats={}),),
        broken=(),
        vocab_size=total + 1,
        digest="",
    )
