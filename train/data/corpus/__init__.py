"""The built-in text: what `--data` trains on when no files are named, without a network."""

from pathlib import Path

TINY_SHAKESPEARE = Path(__file__).parent / "tinyshakespeare.txt"
