"""The estimate for other GPUs: cycles per instruction; the H200 gives back its measured share."""

import pytest

from tests.jaxattn import estimate

BODY = ["HMMA.16816.F32.BF16 R0, R4, R8, R0"] * 256 + ["LDSM.16.M88.4 R0, [R1]"] * 80
BODY += ["MUFU.EX2 R1, R2"] * 68 + ["LDGSTS.E.128 [R1], [R2]"] * 8 + ["STS [R1], R2"] * 4


def test_cycles_of_a_tile():
    """An A100 runs a mma.sync of 16 x 8 x 16 in 8 cycles; 128 bytes move per cycle."""
    assert estimate.tensor_cycles(estimate.GPUS["A100"], 256) == pytest.approx(256 * 8, rel=0.01)
    assert estimate.tensor_cycles(estimate.GPUS["RTX 4090"], 1) == pytest.approx(32, rel=0.01)
    assert estimate.other_cycles(BODY) == 80 * 16 + 68 * 8 + 8 * 16 + 4 * 4


def test_the_measured_gpu_is_reproduced():
    share = estimate.not_overlapped_on_h200(BODY, 0.61)
    assert 0 < share < 1
    assert estimate.peak_share(estimate.H200, BODY, share) == pytest.approx(0.61)
    low, high = (estimate.peak_share(estimate.GPUS["L40S"], BODY, s) for s in (1.0, share))
    assert low < high < 1


def test_one_of_two_copies_of_dq_counts():
    """384 mma.sync are five products and the second copy of dQ; any other loop stays as it is."""
    body = ["HMMA.16816.F32.BF16 R0, R4, R8, R0", "LDSM.16.M88.4 R0, [R1]"] * 384 + BODY[256:]
    kept = estimate.without_second_dq(body)
    assert (sum("HMMA" in x for x in kept), sum("LDSM" in x for x in kept)) == (320, 384 - 32 + 80)
    assert len(kept) == len(body) - 96
    assert estimate.without_second_dq(BODY) == BODY
