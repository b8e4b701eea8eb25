"""Backward kernels for Hopper GPUs."""
