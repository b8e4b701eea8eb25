"""Weights, in and out: HF's files, directories of converted weights, checkpoints of runs."""
