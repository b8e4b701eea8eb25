"""What is stored thread by thread lies where Pallas and wgmma look for it (on a Hopper GPU)."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.pallas import lanes
from jaxattn.pallas.softmax import TILE
from jaxattn.pallas.sync import swizzled


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [64, 128])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "fp16"])
def test_store_factor_is_read_back(columns, dtype):
    """Every number of a tile, all of them different, comes back from where it belongs."""
    shape = (64, columns)

    def kernel(x_gmem, out_gmem, x_smem, out_smem, full):
        plgpu.copy_gmem_to_smem(x_gmem, x_smem, full)
        plgpu.barrier_wait(full)
        lanes.store_factor(out_smem, plgpu.load(x_smem, layout=TILE))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_gmem)
        plgpu.wait_smem_to_gmem(0)

    run = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(shape, dtype),
        scratch_types={
            "x_smem": plgpu.SMEM(shape, dtype, transforms=swizzled(dtype)),
            "out_smem": plgpu.SMEM(shape, dtype, transforms=swizzled(dtype)),
            "full": plgpu.Barrier(),
        },
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    bits = np.arange(64 * columns, dtype=np.uint16).reshape(shape)  # all finite in both types
    x = jax.lax.bitcast_convert_type(jnp.asarray(bits), dtype)
    found = jax.lax.bitcast_convert_type(run(x), jnp.uint16)
    np.testing.assert_array_equal(np.asarray(found), bits)
