"""Rows to tokens, by all cores, and the cache that keeps them."""
