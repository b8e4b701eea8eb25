"""Shuffles that stay the same for ever: the order of documents and of rows is part of a run."""

import numpy as np
from jaxtyping import Int64


def shuffled(n: int, *key: int) -> Int64[np.ndarray, " n"]:
    """Returns a random order of 0..n-1 that depends on `key` alone.

    Made of the raw bits of PCG64, which numpy promises not to change; the stream of
    `Generator.permutation` may change with a numpy release, and with it every resumed run.

    Args:
        n: how many.
        key: integers >= 0, e.g. seed and epoch.

    References:
        NEP 19, "Random number generator policy".
    """
    bits = np.random.PCG64(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(bits, kind="stable").astype(np.int64)
