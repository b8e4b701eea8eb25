"""What the backward pass finds in memory; the rest of a block it recomputes.

Names are given where a value is made: "attn_out" and "attn_lse" by jaxattn's kernel, "gate_up"
and "norm_scale" in models/layers.py, "block_input" in models/internlm2.py, the others in
models/block.py.
"""

from collections.abc import Callable

import jax

_POLICIES = jax.checkpoint_policies
# From the most memory on the device to the least; then what takes the host's.
REMAT: dict[str, Callable | None] = {
    "none": _POLICIES.everything_saveable,
    # What matrix products and attention gave, the last one with the residual added; norms and
    # SwiGLU are cheap to repeat, but the norms' scales (4 bytes a token) would take a pass more.
    "dots": _POLICIES.save_only_these_names(
        "attn_out", "attn_lse", "qkv", "ffn_input", "gate_up", "norm_scale"
    ),
    # As "attention", and the rotated q, k, v: their projection is not recomputed either.
    "qkv": _POLICIES.save_only_these_names("attn_out", "attn_lse", "qkv"),
    # The attention kernel does not run again in the backward pass.
    "attention": _POLICIES.save_only_these_names("attn_out", "attn_lse"),
    # Only the input of each block.
    "full": _POLICIES.nothing_saveable,
    # As "attention", but in the host's memory: only one block's at a time on the device.
    "offload": _POLICIES.save_and_offload_only_these_names(
        names_which_can_be_saved=["attn_lse"],
        names_which_can_be_offloaded=["attn_out", "block_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
