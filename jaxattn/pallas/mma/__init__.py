"""Kernels by mma.sync, for GPUs without wgmma (Ampere, Ada, Blackwell workstation) and Hopper."""
