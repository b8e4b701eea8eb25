"""The block-sparse flash attention kernels for Hopper GPUs; `op.py` is the way in."""
