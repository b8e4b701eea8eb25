"""Write and read checkpoints: complete ones, or none."""
