"""The package's public names are imported on first use."""

import subprocess
import sys

import pytest

import models


def test_every_public_name_exists():
    assert all(getattr(models, name) is not None for name in models.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = models.nothing


def test_a_tokenizer_is_loaded_without_jax():
    """Workers that tokenize start in a fraction of the time that importing jax takes."""
    code = (
        "import sys; from models.tokenizer import load_tokenizer; load_tokenizer('byte');"
        "from models.chat import encode_chat; assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
