"""Built-in text: the training data of a run without --data, also without a network."""

from pathlib import Path

TINY_SHAKESPEARE = Path(__file__).parent / "tinyshakespeare.txt"
