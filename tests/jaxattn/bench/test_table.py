"""The bench's printed table."""

from jaxattn.bench.table import table


def test_ratio_to_cudnn_is_of_rates():
    """Twice as fast as cudnn forward, half as fast with backward; no ratio where one is missing."""
    cells = {
        "dense": {
            "pallas": {"forward_ms": 1.0, "both_ms": 8.0},
            "cudnn": {"forward_ms": 2.0, "both_ms": 4.0},
        },
        "packed": {
            "pallas": {"forward_ms": 1.0, "both_ms": 8.0},
            "cudnn": {"why_not": "documents"},
        },
    }
    head, dense, packed = table(cells).splitlines()
    assert head.split() == ["shape", "pallas", "cudnn", "pallas/cudnn"]
    assert dense.endswith("2.00 / 0.50")
    assert packed.endswith("1.00 / 8.00  -            -")
