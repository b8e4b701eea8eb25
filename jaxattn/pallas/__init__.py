"""Block-sparse flash attention kernels: by wgmma for Hopper GPUs, by mma.sync for others.

`op.py` is the entry, and chooses the kernels: `wgmma/forward/kernel.py`, `wgmma/backward/kernel.py`
on Hopper, `mma/forward.py`, `mma/backward.py` on other GPUs, and a `dq_kernel.py` of each family
for the deterministic backward pass. Their work comes from `jaxattn/block_map.py`, which pairs are
visible from `jaxattn/mask.py`.
"""
