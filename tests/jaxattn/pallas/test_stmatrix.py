"""Values stored thread by thread are where Pallas and wgmma read them (on a Hopper GPU)."""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.pallas import stmatrix
from jaxattn.pallas.smem import swizzled
from jaxattn.pallas.softmax import TILE


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "fp16"])
def test_store_transposed_is_read_back(rows, dtype):
    """Two tiles side by side: every number, all of them different, comes back from its place."""
    shape = (2, 64, rows)

    def kernel(x_gmem, out_gmem, x_smem, out_smem, full):
        plgpu.copy_gmem_to_smem(x_gmem, x_smem, full)
        plgpu.barrier_wait(full)
        for half in range(2):
            own = out_smem.at[:, pl.ds(64 * half, 64)]
            stmatrix.store_transposed(own, plgpu.load(x_smem.at[half], layout=TILE))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_gmem)
        plgpu.wait_smem_to_gmem(0)

    run = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((rows, 128), dtype),
        scratch_types={
            "x_smem": plgpu.SMEM(shape, dtype, transforms=swizzled(dtype)),
            "out_smem": plgpu.SMEM((rows, 128), dtype, transforms=swizzled(dtype)),
            "full": plgpu.Barrier(),
        },
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    bits = np.arange(2 * 64 * rows, dtype=np.uint16).reshape(shape)  # all finite in both types
    x = jax.lax.bitcast_convert_type(jnp.asarray(bits), dtype)
    found = jax.lax.bitcast_convert_type(run(x), jnp.uint16)
    np.testing.assert_array_equal(np.asarray(found), np.concatenate(bits).T)
