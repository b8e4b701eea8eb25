"""The story of a run, from its flags to its last checkpoint."""
