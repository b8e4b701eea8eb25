"""examples/attention_alone.py runs and shows the property that it prints."""

import runpy
from pathlib import Path

import jax

EXAMPLE = Path(__file__).parents[2] / "examples" / "attention_alone.py"


def test_attention_alone_runs(capsys):
    """The padding's output is exactly 0; q, k and v have gradients of their own shapes."""
    with jax.numpy_dtype_promotion(
        "standard"
    ):  # a user's own program, without the tests' strictness
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    shown = capsys.readouterr().out
    assert "output of the padding is exactly 0: True" in shown
    assert "gradient of q: (2, 512, 8, 128)\ngradient of k: (2, 512, 2, 128)" in shown
    assert "mask causal + documents" in shown
