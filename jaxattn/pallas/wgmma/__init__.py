"""Block-sparse flash attention kernels for Hopper GPUs (wgmma, TMA)."""
