"""Forward kernel for Hopper GPUs."""
