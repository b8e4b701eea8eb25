"""InternLM2: a decoder with grouped-query attention, RMSNorm and SwiGLU.

The modules are plain pytrees: use them under jax.jit, jax.grad, jax.vmap and lax.scan.

B batch, T query pos, N query heads, K kv heads, H head dim, D embed, V vocab, L layers. A stacked
parameter has a leading layer axis L before those it names.

References:
  Cai et al. 2024, arXiv:2403.17297; the original modeling_internlm2.py.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxattn import Mask, attention, prepare
from models import sharding
from models.block import Attend, Block, Rope
from models.config import ModelConfig
from models.layers import constant, document_positions, normal, rms_norm, rope_table
from models.remat import REMAT
from models.unstack import gradients_together, unstacked

Ids = Int[Array, "B T"] | Int[np.ndarray, "B T"]


class InternLM2(nnx.Module):
    """The model: embedding, L blocks under one scan, final norm, output matrix.

    Parameters are stored in param_dtype and cast to dtype once a call. The embedding is looked up
    before it is cast, so that the gradients of a frequent token add up in param_dtype.

    The embedding row of pad_token_id gets no gradient as an input, and starts at zero, exactly as
    padding_idx does in the original. In InternLM2 pad is also eos, so fine-tuning never changes
    what eos looks like as an input; it does train eos as a target (the output matrix, which a
    tied model shares with the embedding). Packed training loses nothing by it: a document ends
    with eos and no later token sees it.

    Args:
      config: the architecture.
      rngs: its `params` stream draws the weights: normal(0, initializer_range), norms 1, biases 0.
      attn: attention implementation, a name that `jaxattn.attention` knows.
      deterministic: attention's gradients are the same bits in every run, as `jaxattn.attention`
        promises them.
      dtype: type of activations and of the weights in use.
      param_dtype: type of the stored weights.
      remat: what the backward pass recomputes, a key of `models.remat.REMAT`.
      scan: run training's layers as one loop over stacked weights, which compiles L times less;
        else each layer is compiled, and XLA neither copies what remat keeps into and out of
        stacks nor the weights out of theirs (measured at 1.8B: 12% of a step). Prefill always
        scans, decoding never does.

    Raises:
      ValueError: remat is unknown.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        attn: str = "auto",
        deterministic: bool = False,
        dtype=jnp.bfloat16,
        param_dtype=jnp.float32,
        remat: str = "full",
        scan: bool = True,
    ):
        if remat not in REMAT:
            raise ValueError(f"remat={remat!r} must be one of {', '.join(REMAT)}")
        V, D, std = config.vocab_size, config.hidden_size, config.initializer_range
        self.config = config
        self.attn = attn
        self.deterministic = deterministic
        self.dtype = jnp.dtype(dtype)
        self.remat = remat
        self.scan = scan
        self.embed_VD = normal(rngs, (V, D), (None, "table"), std, param_dtype)
        if 0 <= config.pad_token_id < V:
            self.embed_VD[...] = self.embed_VD[...].at[config.pad_token_id].set(0)
        self.blocks = jax.vmap(lambda r: Block(config, rngs=r, param_dtype=param_dtype))(
            rngs.split(config.num_layers)
        )
        self.norm_D = constant(1.0, (D,), (None,), param_dtype)
        if not config.tie_word_embeddings:
            self.output_DV = normal(rngs, (D, V), ("embed", "vocab"), std, param_dtype)

    def __call__(
        self,
        tokens_BT: Ids,
        *,
        positions: Ids | None = None,
        segment_ids: Ids | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of the next token, fp32; arguments as `hidden`.

        Memory: B * T * V floats, 12 GB at 32k tokens of the real vocabulary: training uses
        `hidden` and `unembedding` in chunks instead.
        """
        with sharding.mesh_of(self.norm_D[...]):
            x_BTD = self.hidden(tokens_BT, positions=positions, segment_ids=segment_ids)
            return logits(x_BTD, self.unembedding())

    def hidden(
        self,
        tokens_BT: Ids,
        *,
        positions: Ids | None = None,
        segment_ids: Ids | None = None,
    ) -> Float[Array, "B T D"]:
        """What the output matrix multiplies: the residual stream after the final norm.

        Args:
          tokens_BT: ids in 0 .. V - 1; B a multiple of the mesh's data and fsdp axes.
          positions: position of each token in its document; None: counted from the start of each
            run of equal segment ids, or of the row.
          segment_ids: document of each token, 0 for padding; None: one document a row.

        Returns:
          [B, T, D] in the compute type.
        """
        with sharding.mesh_of(self.norm_D[...]):
            tokens, positions, segments = self._laid_out(tokens_BT, positions, segment_ids)
            mask = self.prepare_mask(tokens.shape, segments)

            def attend(q_BTNH, k_BTKH, v_BTKH, _):
                out_BTNH = attention(
                    q_BTNH, k_BTKH, v_BTKH, mask, impl=self.attn, deterministic=self.deterministic
                )
                return out_BTNH, None

            rope = rope_table(positions, self.config, segment_ids=segments)
            x_BTD, _ = self.run_blocks(self.embed(tokens), rope, attend, scan=self.scan)
            return x_BTD

    def prepare_mask(self, shape: tuple[int, ...], segment_ids: Int[Array, "B T"] | None) -> Mask:
        """The causal mask of a batch [B, T], with the metadata that all layers share."""
        c = self.config
        q_BTNH, k_BTKH = (
            sharding.struct((*shape, heads, c.head_dim), self.dtype, "batch", None, "heads", None)
            for heads in (c.num_heads, c.num_kv_heads)
        )
        return prepare(Mask(segment_ids=segment_ids), q_BTNH, k_BTKH, impl=self.attn)

    def embed(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Rows of the embedding in the compute type; that of padding is a constant."""
        table_VD = sharding.gathered(self.embed_VD[...], None, "table")
        x_BTD = sharding.take_rows(table_VD, tokens_BT, "batch", None, "table_in_use")
        x_BTD = sharding.constrain(x_BTD.astype(self.dtype), "batch", None, None)
        is_pad_BT1 = (tokens_BT == self.config.pad_token_id)[..., None]
        return jnp.where(is_pad_BT1, jax.lax.stop_gradient(x_BTD), x_BTD)

    def run_blocks(
        self,
        x_BTD: Float[Array, "B T D"],
        rope: Rope,
        attend: Attend,
        carried: Sequence[Any] | None = None,
        *,
        scan: bool = True,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """All layers and the final norm: what training, prefill and decoding share.

        Args:
          x_BTD: embedded tokens in the compute type.
          rope: cos, sin of `rope_table`.
          attend: how each block attends.
          carried: None, or for each layer what its attend is given; not under a scan.
          scan: as a loop that is compiled once, or layer by layer; the results are the same.

        Returns:
          The normed residual stream, and the layers' second results: stacked [L, ...] by a scan,
          else a list of them.
        """

        def layer(x_BTD, block, carried):
            x_BTD = checkpoint_name(x_BTD, "block_input")
            return block(x_BTD, rope, attend, carried)

        layer = jax.checkpoint(layer, policy=REMAT[self.remat])
        blocks = jax.tree.map(lambda w: w.astype(self.dtype), self.blocks)
        if scan:
            assert carried is None, "a scan would copy each layer's part out of a stack"
            x_BTD, results = jax.lax.scan(lambda x, block: layer(x, block, None), x_BTD, blocks)
        else:
            L, results = self.config.num_layers, []
            apart = blocks if isinstance(blocks, nnx.List) else unstacked(blocks, L)
            for block, part in zip(apart, carried or [None] * L, strict=True):
                x_BTD, result = layer(*gradients_together(x_BTD, block), part)
                results.append(result)
        return rms_norm(x_BTD, self.norm_D[...], eps=self.config.rms_norm_eps), results

    def unembedding(self) -> Float[Array, "D V"]:
        """The output matrix in the compute type, gathered over fsdp, columns over tensor."""
        with sharding.mesh_of(self.norm_D[...]):
            if self.config.tie_word_embeddings:
                table_VD = sharding.gathered(self.embed_VD[...].astype(self.dtype), None, "table")
                return sharding.constrain(table_VD.T, None, "vocab")
            return sharding.gathered(self.output_DV[...].astype(self.dtype), "embed", "vocab")

    def _laid_out(
        self, tokens_BT: Ids, positions: Ids | None, segment_ids: Ids | None
    ) -> tuple[Array, Array, Array | None]:
        """The inputs as jax arrays split over the mesh, with the default positions filled in."""

        def place(ids):
            return sharding.constrain(jnp.asarray(ids), "batch", None)

        tokens_BT = place(tokens_BT)
        segment_ids = None if segment_ids is None else place(segment_ids)
        if positions is not None:
            positions = place(positions)
        elif segment_ids is not None:
            positions = document_positions(segment_ids)
        else:
            index_T = jnp.arange(tokens_BT.shape[1])
            positions = place(jnp.broadcast_to(index_T[None], tokens_BT.shape))
        return tokens_BT, positions, segment_ids


def logits(x_BTD: Float[Array, "B T D"], w_DV: Float[Array, "D V"]) -> Float[Array, "B T V"]:
    """The product x w, accumulated and returned in fp32."""
    return sharding.einsum(
        "BTD,DV->BTV",
        x_BTD,
        w_DV,
        out=("batch", None, "vocab"),
        preferred_element_type=jnp.float32,
    )


def init(
    config: ModelConfig,
    *,
    seed: int | Int[Array, ""] = 0,
    mesh: jax.sharding.Mesh | None = None,
    **kwargs: Any,
) -> InternLM2:
    """A model with random weights, each created where it is to live.

    No device ever holds more than its own shards: the weights are drawn inside one jit whose
    outputs are sharded. They do not depend on the mesh.

    Args:
      config: the architecture.
      seed: of the weights.
      mesh: None: the default device.
      **kwargs: attn, deterministic, dtype, param_dtype, remat of `InternLM2`.

    Raises:
      ValueError: the mesh does not divide the model.
    """

    def create():
        return InternLM2(config, rngs=nnx.Rngs(params=seed), **kwargs)

    if mesh is None:
        return jax.jit(create)()
    placed = sharding.shardings(jax.eval_shape(create), mesh)
    # Without a current mesh the compiler spreads the drawing itself by the outputs' shardings;
    # under an explicit mesh every intermediate would be whole on every device.
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        return jax.jit(create, out_shardings=placed)()
