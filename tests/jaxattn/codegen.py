"""Compiles both kernels for an H200 on a machine without a GPU; the compiler's dumps go to stdout.

    python -m tests.jaxattn.codegen HEADS KV_HEADS HEAD_DIM causal|documents

A process of its own, because it is the compiler, beneath Python, that prints ptxas' report and
the SASS. Needs the `codegen` extra; `make codegen` sets it up.
"""

import os
import sys

# The CUDA plugin is registered, but no driver is looked for.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
os.environ["MOSAIC_GPU_DUMP_SASS"] = "1"

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from jaxattn.mask import Mask
from jaxattn.pallas import op

LENGTH = 32768
# What the compiler asks about its target: the limits of compute capability 9.0 (CUDA C++
# Programming Guide, "Technical Specifications per Compute Capability") and an H200's datasheet.
# XLA has such descriptions built in, but no way to name one from outside.
H200 = """\
platform_name: "CUDA"
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: 52428800
  memory_bandwidth: 4800000000000
  device_memory_size: 151397597184
  clock_rate_ghz: 1.98
}
"""


def main(num_heads: int, num_kv_heads: int, head_dim: int, kind: str) -> None:
    """Compiles the forward and backward pass of one row of 32k tokens."""
    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=H200)
    mesh = topologies.make_mesh(topo=topology, mesh_shape=(1,), axis_names=("x",))
    on_h200 = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    q, k = (
        jax.ShapeDtypeStruct((1, LENGTH, heads, head_dim), jnp.bfloat16)
        for heads in (num_heads, num_kv_heads)
    )
    ids = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32) if kind == "documents" else None
    # The metadata is an argument: only the kernels are of interest here.
    mask = jax.eval_shape(lambda mask: op.prepare(mask, q, k), Mask(segment_ids=ids))

    def both(q, k, v, mask, do):
        def attend(q, k, v):
            return op.attention(q, k, v, mask, scale=head_dim**-0.5)

        out, pullback = jax.vjp(attend, q, k, v)
        return out, *pullback(do)

    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_h200), (q, k, k, mask, q)
    )
    jax.jit(both).trace(*args).lower().compile()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), sys.argv[4])
