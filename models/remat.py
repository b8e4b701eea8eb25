"""Rematerialization policies: the activations that the forward pass saves for the backward pass.

The names are given by `checkpoint_name`: "attn_qkv" (its inputs, after rotary embedding),
"attn_out" and "attn_lse" in jaxattn, "gate_up" and "norm_scale" in models/layers.py, "block_input"
in models/internlm2.py, "fp8_max" (scalars) in models/fp8.py, the others in models/block.py.
"""

from collections.abc import Callable
from typing import Any

import jax

Policy = Callable[..., Any]

_POLICIES = jax.checkpoint_policies


def _in_host_memory(*names: str, saved: tuple[str, ...]) -> Policy:
    return _POLICIES.save_and_offload_only_these_names(
        names_which_can_be_saved=[*saved],
        names_which_can_be_offloaded=[*names],
        offload_src="device",
        offload_dst="pinned_host",
    )


# From the most device memory to the least; "offload" and "offload_input" take host memory.
REMAT: dict[str, Policy] = {
    "none": _POLICIES.everything_saveable,
    # Save outputs of matrix products and attention, the last one with the residual added. Norms
    # and SwiGLU are cheap to recompute, but the norms' scales (4 bytes a token) need another pass.
    "dots": _POLICIES.save_only_these_names(
        "attn_out", "attn_lse", "attn_qkv", "ffn_input", "gate_up", "norm_scale", "fp8_max"
    ),
    # As "attention", and q, k, v after rotary embedding: their projection is not recomputed.
    "qkv": _POLICIES.save_only_these_names("attn_out", "attn_lse", "attn_qkv", "fp8_max"),
    # Save the output of attention: the attention kernel does not run again in the backward pass.
    "attention": _POLICIES.save_only_these_names("attn_out", "attn_lse", "fp8_max"),
    # Save only the input of each block.
    "full": _POLICIES.save_only_these_names("fp8_max"),
    # As "attention", but in host memory; the device holds the activations of one block at a time.
    "offload": _in_host_memory("attn_out", "block_input", saved=("attn_lse", "fp8_max")),
    # As "full", but in host memory.
    "offload_input": _in_host_memory("block_input", saved=("fp8_max",)),
}
IN_TILES = ("qkv", "attention", "full", "offload", "offload_input")
"""Policies that save nothing which is computed inside a tile of tokens (`models.tiles`)."""


def parse_remat(remat: str, *, flag: str = "remat") -> tuple[str, ...]:
    """Return the names of one policy, or of several that consecutive layers take in turn.

    "offload_input,full" keeps the inputs of layers 0, 2, 4 .. in host memory, and those of layers
    1, 3, 5 .. on the device.

    `remat` has keys of `REMAT`, separated by commas; `flag` is its name in the error.

    Raises:
      ValueError: a name is unknown.
    """
    names = tuple(remat.split(","))
    if unknown := [name for name in names if name not in REMAT]:
        raise ValueError(f"{flag}={unknown[0]} must be one of {', '.join(REMAT)}")
    return names


def remat_policies(remat: str) -> tuple[Policy, ...]:
    """Return the policies that consecutive layers take in turn."""
    return tuple(REMAT[name] for name in parse_remat(remat))
