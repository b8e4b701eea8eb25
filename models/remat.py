"""Rematerialization policies: the activations that the forward pass saves for the backward pass.

The names are given by `checkpoint_name`: "attn_qkv" (its inputs, after rotary embedding),
"attn_out" and "attn_lse" in jaxattn, "gate_up" and "norm_scale" in models/layers.py, "block_input"
in models/internlm2.py, "fp8_max" (scalars) in models/fp8.py, the others in models/block.py.
"""

from collections.abc import Callable

import jax

_POLICIES = jax.checkpoint_policies
# From the most device memory to the least; "offload" takes host memory.
REMAT: dict[str, Callable] = {
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
    "offload": _POLICIES.save_and_offload_only_these_names(
        names_which_can_be_saved=["attn_lse", "fp8_max"],
        names_which_can_be_offloaded=["attn_out", "block_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
