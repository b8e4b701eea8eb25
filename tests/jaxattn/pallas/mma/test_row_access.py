"""The order of the sums in global memory."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.pallas.mma.row_access import in_rows


@pytest.mark.parametrize("vector", [False, True])
def test_in_rows_inverts_the_order_of_the_threads(vector):
    """Thread t of a warp has columns 2 * (t % 4) and the next, of row t // 4, of 8 x 8 numbers."""
    rows, heads, head_dim = 16, 2, 64
    want = np.arange(rows * heads * head_dim, dtype=np.float32).reshape(rows, heads, head_dim)
    sums = np.zeros((rows // 8, heads, 8 * head_dim), np.float32)
    for eight, head, block, thread, n in np.ndindex(rows // 8, heads, head_dim // 8, 32, 2):
        if vector:  # a thread has four numbers, of two blocks of its warp; blocks alternate by warp
            pair, (second, warp) = block // 4, divmod(block % 4, 2)
            at = 256 * pair + 128 * warp + 4 * thread + 2 * second + n
        else:
            at = 64 * block + 32 * n + thread
        value = want[8 * eight + thread // 4, head, 8 * block + 2 * (thread % 4) + n]
        sums[eight, head, at] = value
    got = in_rows(jnp.asarray(sums), head_dim, m_warps=2, vector=vector)
    np.testing.assert_array_equal(np.asarray(got), want)
