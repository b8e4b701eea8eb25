"""The byte tokenizer, and a way to write data files."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from models.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture
def tokenizer() -> Tokenizer:
    """Bytes as ids 3..258 after <unk> 0, <s> 1, </s> 2; 263 <|im_end|> and 264 <|im_start|>."""
    return load_tokenizer("byte")


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, object], Path]:
    """Writes a file of a name and content: bytes, str, or rows for .jsonl lines or an array."""

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
