"""Reading and writing weights: HF files, orbax directories, checkpoints of training runs."""
