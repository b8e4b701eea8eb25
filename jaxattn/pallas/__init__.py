"""Block-sparse flash attention kernels: by wgmma for Hopper GPUs, by mma.sync for others."""
