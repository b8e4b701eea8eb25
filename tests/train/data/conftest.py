"""A byte tokenizer with chat tokens, and a way to write data files."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest


class Bytes:
    """Bytes as ids 3..258 after <unk> 0, <s> 1, </s> 2; then <|im_end|> and <|im_start|>."""

    bos_id, pad_id, im_end_id, im_start_id = 1, 2, 259, 260

    def encode(self, text: str) -> list[int]:
        return [byte + 3 for byte in text.encode()]


@pytest.fixture
def tokenizer() -> Bytes:
    return Bytes()


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
