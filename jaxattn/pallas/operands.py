"""Arrays that the kernels take, the same for both families.

R rows = B * T concatenated queries, C columns = B * S keys, N query heads, K kv heads, H head dim
(64 or 128). Arrays have the dtype of the queries, bf16 or fp16, unless another one is named.
"""

import dataclasses

from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operands:
    """Queries, keys and values: the operands of the forward kernel."""

    q_RNH: Float[Array, "R N H"]
    k_CKH: Float[Array, "C K H"]
    v_CKH: Float[Array, "C K H"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackwardOperands(Operands):
    """Operands of the backward kernel and of the dq kernel.

    Attributes:
      do_RNH: gradient of the output.
      lse_NR: log-sum-exp as the forward kernel returns it, fp32; rows beyond R are not read for any
        visible pair.
      delta_NR: subtrahend of dP, fp32: the sum over H of o * do, minus the gradient of the natural
        log-sum-exp if there is one.
    """

    do_RNH: Float[Array, "R N H"]
    lse_NR: Float[Array, "N rows"]
    delta_NR: Float[Array, "N rows"]
