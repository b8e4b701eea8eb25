"""Compiles the kernels for a GPU on a machine without one; the compiler's dumps go to stdout.

    python -m tests.jaxattn.codegen HEADS KV_HEADS HEAD_DIM causal|documents [CAPABILITY] [FAMILY]
        [CUDA]

CAPABILITY is a compute capability, 9.0 by default, and FAMILY wgmma (default) or mma, whose dq
kernel is compiled, too. CUDA is 13 (default) or 12, whose ptxas compiles the kernels. A process of
its own, because it is the compiler, beneath Python, that prints ptxas' report and the SASS. Needs
the `codegen` extra; `make codegen` sets it up.
"""

import importlib.util
import os
import pathlib
import sys
import tempfile

# The CUDA plugin is registered, but no driver is looked for.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
os.environ["MOSAIC_GPU_DUMP_SASS"] = "1"

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.mosaic.gpu import utils

from jaxattn.mask import Mask
from jaxattn.pallas import op
from jaxattn.pallas.tiles import CHIPS

LENGTH = 32768
# What the compiler asks about its target: the limits of the compute capability (CUDA C++
# Programming Guide, "Technical Specifications per Compute Capability") and a datasheet, that of an
# H200 for 9.0. XLA has such descriptions built in, but no way to name one from outside.
TARGET = """\
platform_name: "CUDA"
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} {extension} }}
  core_count: {cores}
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {smem}
  shared_memory_per_core: {smem_total}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: 52428800
  memory_bandwidth: 4800000000000
  device_memory_size: 151397597184
  clock_rate_ghz: 1.98
}}
"""
# Multiprocessors of an A100, RTX 3090, L40S, H200 and RTX 5090.
CORES = {"8.0": 108, "8.6": 82, "8.9": 142, "9.0": 132, "12.0": 170}


def main(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    kind: str,
    capability: str = "9.0",
    family: str = "wgmma",
    cuda: str = "13",
) -> None:
    """Compile the forward and backward pass of one row of 32k tokens."""
    if cuda == "12":
        use_cuda_12(tempfile.mkdtemp())
    major, minor = map(int, capability.split("."))
    chip = CHIPS[capability]
    target = TARGET.format(
        major=major,
        minor=minor,
        extension="feature_extension: ACCELERATED_FEATURES" if major >= 9 else "",
        cores=CORES[capability],
        smem=chip.smem,
        smem_total=chip.smem_total,
    )
    # Mosaic GPU asks the default device, which is a CPU here, and assumes 9.0.
    utils._infer_arch = lambda: (major, minor)
    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=target)
    mesh = topologies.make_mesh(topo=topology, mesh_shape=(1,), axis_names=("x",))
    on_gpu = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    q, k = (
        jax.ShapeDtypeStruct((1, LENGTH, heads, head_dim), jnp.bfloat16)
        for heads in (num_heads, num_kv_heads)
    )
    ids = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32) if kind == "documents" else None
    kernels = {"family": family, "capability": capability}
    # The metadata is an argument: only the kernels are of interest here.
    mask = jax.eval_shape(lambda mask: op.prepare(mask, q, k, **kernels), Mask(segment_ids=ids))

    def both(q, k, v, mask, do):
        results = []
        for deterministic in (False, True) if family == "mma" else (False,):
            options = {"scale": head_dim**-0.5, "deterministic": deterministic, **kernels}

            def attend(q, k, v, options=options):
                return op.attention(q, k, v, mask, **options)

            out, pullback = jax.vjp(attend, q, k, v)
            results += [out, *pullback(do)]
        return results

    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_gpu), (q, k, k, mask, q)
    )
    jax.jit(both).trace(*args).lower().compile()


def use_cuda_12(root: str) -> None:
    """Make Mosaic GPU use ptxas of CUDA 12, which is installed beside that of CUDA 13."""
    [nvidia] = importlib.util.find_spec("nvidia").submodule_search_locations
    tools = pathlib.Path(root, "bin")
    tools.mkdir()
    (tools / "ptxas").symlink_to(pathlib.Path(nvidia, "cuda_nvcc/bin/ptxas"))
    (tools / "nvdisasm").symlink_to(pathlib.Path(nvidia, "cu13/bin/nvdisasm"))
    (tools.parent / "nvvm").symlink_to(pathlib.Path(nvidia, "cuda_nvcc/nvvm"))
    os.environ["MOSAIC_GPU_CUDA_ROOT"] = root


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), *sys.argv[4:])
