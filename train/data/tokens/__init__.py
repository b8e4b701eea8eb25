"""Rows to tokens, on all cores, and the cache that keeps them."""
