"""What a run asks of jaxattn, and the one log line about it."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, DTypeLike, Int

import jaxattn
from models.config import ModelConfig
from models.sharding import spec


def resolve_attention(
    attn: str,
    model: ModelConfig,
    mesh: Mesh,
    *,
    rows: int,
    seq_len: int,
    dtype: DTypeLike,
    documents: bool = True,
    deterministic: bool = False,
) -> str:
    """The implementation that will run rows of this shape.

    Args:
        attn: what was asked for.
        model: for the heads.
        mesh: the devices.
        rows: of a microbatch.
        seq_len: tokens of a row.
        dtype: compute type.
        documents: whether rows are packed with several documents.
        deterministic: whether it must give the same bits in every run.

    Raises:
        ValueError: unknown implementation.
        NotImplementedError: it cannot run here, and what to use instead.
    """
    q, k = _structs(model, mesh, rows, seq_len, dtype)
    ids_BT = jnp.ones((rows, seq_len), jnp.int32) if documents else None
    with jax.set_mesh(mesh):
        mask = jaxattn.Mask(segment_ids=ids_BT)
        return jaxattn.resolve(attn, q, k, mask, deterministic=deterministic)[0]


def dispatch_line(
    attn: str,
    model: ModelConfig,
    mesh: Mesh,
    segment_ids_BT: Int[np.ndarray | Array, "B T"],
    *,
    dtype: DTypeLike,
) -> str:
    """Names what runs, why, where, its tiles, and the share of them that a real batch skips.

    Args:
        attn: what was asked for.
        model: for the heads.
        mesh: the devices.
        segment_ids_BT: documents of a microbatch.
        dtype: compute type.
    """
    rows, seq_len = segment_ids_BT.shape
    q, k = _structs(model, mesh, rows, seq_len, dtype)
    with jax.set_mesh(mesh):
        mask = jaxattn.Mask(segment_ids=jnp.asarray(segment_ids_BT))
        return f"dispatch internlm2 attn forward: {jaxattn.describe(attn, q, k, mask)}"


def _structs(model: ModelConfig, mesh: Mesh, rows: int, seq_len: int, dtype: DTypeLike):
    """Queries [B, T, N, H] and keys [B, T, K, H] of a layer, without numbers."""
    where = NamedSharding(mesh, spec(("batch", None, "heads", None), mesh))
    return tuple(
        jax.ShapeDtypeStruct((rows, seq_len, heads, model.head_dim), dtype, sharding=where)
        for heads in (model.num_heads, model.num_kv_heads)
    )
