"""The bench runs end to end, counts the bytes of a decoding step, and bounds a load's memory."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import pytest

from models import bench
from models.config import PRESETS
from models.execution import Execution
from models.internlm2 import init
from models.weights.memory import largest_tensor_bytes

# 20B's proportions and names in 0.4 GB of bf16: w1 is 34 MB, the embedding 59.
SHAPED = dataclasses.replace(
    PRESETS["internlm2-20b"],
    vocab_size=23136,
    hidden_size=1280,
    num_layers=6,
    num_heads=10,
    num_kv_heads=2,
    intermediate_size=13312,
)


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


@pytest.fixture
def in_process(monkeypatch):
    """Write and load in this process: a child would import jax first."""

    def run(step, config, directory):
        return {"write": bench._write, "load": bench._load}[step](config, directory)

    monkeypatch.setattr(bench, "_in_process", run)


def test_an_attention_that_cannot_run_is_a_line(tmp_path, capsys, in_process):
    flags = ["--model=nano", "--load", "--prompt=8", "--attn=cudnn", f"--dir={tmp_path}"]
    assert bench.main(flags) == 1
    assert capsys.readouterr().err.startswith("error: attention 'cudnn' cannot run: ")


def test_bytes_of_a_step():
    """Weights without the table that is looked up, and K and V of every slot."""
    c = PRESETS["nano"]
    model = init(c, execution=Execution(dtype=jnp.bfloat16))
    weights = c.num_params() - c.vocab_size * c.hidden_size
    cache = c.num_layers * 3 * 10 * 2 * c.num_kv_heads * c.head_dim
    assert bench.decode_bytes(model, 3, 10) == 2 * (weights + cache)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_load_needs_its_arrays_a_tensor_and_a_shard(tmp_path, monkeypatch):
    """On a CPU arrays are host memory: the model, and above it no more than the bound.

    The file is mapped, so its pages count as far as they were read, though the kernel may take them
    away. A copy of the model, or a second file in memory, would be 0.4 or 0.15 GB more.
    """
    monkeypatch.setattr(bench, "SHARD_BYTES", 150_000_000)
    bench._in_process("write", SHAPED, tmp_path / "weights")
    files = [f.stat().st_size for f in (tmp_path / "weights").glob("*.safetensors")]
    assert len(files) >= 3
    result = bench.measure_load(SHAPED, tmp_path / "weights")
    arrays = 2 * SHAPED.num_params()
    tensor = largest_tensor_bytes(SHAPED, "bfloat16")
    assert tensor == 2 * 23136 * 1280
    assert result["bytes"] == sum(files) and result["gb_per_second"] > 0
    assert result["bound_bytes"] == arrays + 2 * tensor + max(files)
    assert arrays < result["peak_host_bytes"] <= result["bound_bytes"]


def test_a_failed_process_is_one_line(tmp_path):
    with pytest.raises(RuntimeError, match="could not load the weights: .*is not a directory"):
        bench.measure_load(PRESETS["nano"], tmp_path / "nowhere")


def test_bad_flags_are_refused_before_measuring(tmp_path, capsys):
    assert bench.main(["--model=gpt"]) == 1
    assert "weights 'gpt' must be one of nano, " in capsys.readouterr().err
    assert bench.main(["--model=nano", f"--out={tmp_path}/no/where.json"]) == 1
    assert "where.json: " in capsys.readouterr().err
    assert bench.main(["--model=nano", f"--out={tmp_path}"]) == 1
    assert "is a directory or cannot be written" in capsys.readouterr().err
