"""Checksums that find a flipped bit in a checkpoint's arrays or in its metadata.

Orbax notices files that are cut or missing, but not a wrong number inside an array, and JSON has no
checksum of its own.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from train.step.state import Params, TrainState

_DIGEST = "sha256"


def checksum(state: TrainState) -> int:
    """Sum the bits of all arrays modulo 2^32. Integer sums are exact: any mesh gives the same."""
    with jax.set_mesh(state.mesh):
        return int(jax.device_get(_checksum(state)))


def all_finite(params: Params) -> bool:
    """Return True if no weight is NaN or infinite."""
    return bool(jax.device_get(_all_finite(params)))


def with_digest(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata as JSON values, with a SHA-256 of all of them."""
    content = json.loads(json.dumps(metadata))
    return content | {_DIGEST: _sha256(content)}


def read_metadata(checkpoint: Path) -> dict[str, Any]:
    """Read the metadata of a checkpoint directory and verify the SHA-256.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is damaged.
    """
    try:
        content = json.loads((checkpoint / "run" / "metadata").read_bytes())
    except RecursionError as error:
        raise ValueError("run/metadata is nested too deeply") from error
    if not isinstance(content, dict) or content.pop(_DIGEST, None) != _sha256(content):
        raise ValueError("run/metadata does not match its checksum")
    return content


def _sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@jax.jit
def _all_finite(params: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(a)) for a in jax.tree.leaves(params)]))


@jax.jit
def _checksum(state: Any) -> jax.Array:
    total = jnp.uint32(0)
    for n, a in enumerate(jax.tree.leaves(state)):
        bits = jax.lax.bitcast_convert_type(a, jnp.dtype(f"uint{8 * a.dtype.itemsize}"))
        # An odd factor for each array, so that exchanged arrays give another sum.
        total += jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32) * jnp.uint32(2 * n + 1)
    return total
