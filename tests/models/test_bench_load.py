"""A load stays within its bound, measured in a process that does nothing else."""

import dataclasses
import sys

import pytest

from models import bench_load
from models.config import PRESETS
from models.weights import memory

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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_load_needs_its_arrays_a_tensor_and_a_shard(tmp_path, monkeypatch):
    """On a CPU arrays are host memory: the model, and above it no more than the bound says.

    A copy of the model, or of a file beyond the tensor that is read, would be 0.4 or 0.15 GB more
    than what is left between them.
    """
    case = "shaped"
    monkeypatch.setitem(bench_load.CASES, case, SHAPED)
    monkeypatch.setattr(bench_load, "SHARD_BYTES", 150_000_000)
    bench_load._write(SHAPED, tmp_path / "weights")
    files = [f.stat().st_size for f in (tmp_path / "weights").glob("*.safetensors")]
    assert len(files) >= 3
    code = (
        "import sys; from models import bench_load; from tests.models import test_bench_load as t;"
        f"bench_load.CASES[{case!r}] = t.SHAPED; sys.exit(bench_load.main(sys.argv[1:]))"
    )
    result = bench_load.measure(case, tmp_path / "weights", program=("-c", code))
    arrays = 2 * SHAPED.num_params()
    tensor = memory.largest_tensor_bytes(SHAPED, "bfloat16")
    assert tensor == 2 * 23136 * 1280
    assert result["bytes"] == sum(files) and result["gb_per_second"] > 0
    assert result["bound_bytes"] == arrays + tensor + max(files)
    assert arrays < result["peak_host_bytes"] <= result["bound_bytes"]


def test_a_failed_process_is_one_line(tmp_path):
    with pytest.raises(RuntimeError, match="could not load nano: .*is not a directory"):
        bench_load.measure("nano", tmp_path / "nowhere")


def test_the_memory_of_this_process():
    """What it has now is at most what it had at most, and this machine has more than nothing."""
    now, most = memory.resident(), memory.peak()
    assert 0 < now <= most and memory.available() > 0
