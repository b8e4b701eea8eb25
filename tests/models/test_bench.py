"""The bench of loading and generating runs end to end, and counts bytes as a decoder reads them."""

import json

import jax
import jax.numpy as jnp

from models import bench
from models.config import PRESETS
from models.internlm2 import init


def test_it_measures_and_writes(tmp_path, capsys):
    out = tmp_path / "result.json"
    flags = [
        "--model=nano",
        "--load",
        "--prompt=48",
        "--new=5",
        f"--dir={tmp_path}",
        f"--out={out}",
    ]
    with jax.numpy_dtype_promotion("standard"):  # jax.nn's attention promotes bf16
        assert bench.main(flags) == 0
    result = json.loads(out.read_text())
    assert [(r["batch"], r["prompt"]) for r in result["generate"]] == [(1, 48), (1, 48), (16, 48)]
    assert all(r["tokens_per_second"] > 0 and r["first"] > 0 for r in result["generate"])
    assert result["load"]["nano"]["bytes"] > 2 * PRESETS["nano"].num_params()  # bf16, and headers
    assert "load nano: 0.01 GB in " in capsys.readouterr().out
    assert [*tmp_path.iterdir()] == [out]  # the weights are gone


def test_an_attention_that_cannot_run_is_a_line(tmp_path, capsys):
    flags = ["--model=nano", "--load", "--prompt=8", "--attn=palas", f"--dir={tmp_path}"]
    assert bench.main(flags) == 1
    assert capsys.readouterr().err.startswith("error: unknown attention implementation")


def test_bytes_of_a_step():
    """Weights without the table that is looked up, and K and V of every slot."""
    c = PRESETS["nano"]
    model = init(c, dtype=jnp.bfloat16)
    weights = c.num_params() - c.vocab_size * c.hidden_size
    cache = c.num_layers * 3 * 10 * 2 * c.num_kv_heads * c.head_dim
    assert bench.decode_bytes(model, 3, 10) == 2 * (weights + cache)
