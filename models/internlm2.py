"""InternLM2: a decoder-only transformer with grouped-query attention, RMSNorm and SwiGLU.

The modules are pytrees: use them under jax.jit, jax.grad, jax.vmap and lax.scan.

B batch, T query pos, N query heads, K kv heads, H head dim, D embed, V vocab, L layers. A stacked
parameter has a leading layer axis L before those it names.

References:
  Cai et al. 2024, arXiv:2403.17297; the original modeling_internlm2.py.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Key

from jaxattn import Mask, attention, prepare
from models import sharding
from models.block import Attend, Block, Rope, quantize_block
from models.config import ModelConfig
from models.execution import TRAINING, Execution
from models.layers import constant, document_positions, normal, rms_norm, rope_table
from models.lora import LoRAParam, combine, dropout_keys, partition
from models.quantize import cast_weights
from models.remat import remat_policies
from models.xla_workarounds import grad_barrier, unstack

Ids = Int[Array, "B T"] | Int[np.ndarray, "B T"]


class InternLM2(nnx.Module):
    """The model: embedding, L blocks, final norm, output matrix.

    Parameters are stored in param_dtype and cast to dtype once a call. The embedding is looked up
    before it is cast, so that the gradients of a frequent token are summed in param_dtype.

    The embedding row of pad_token_id starts at zero and gets no gradient as an input, as with
    padding_idx in the original. In InternLM2 pad is also eos, so fine-tuning never changes the
    input embedding of eos. Eos is trained as a target, in the output matrix, which a tied model
    shares with the embedding. Packed training loses nothing: a document ends with eos, and no
    later token attends to it.

    Args:
      config: the architecture.
      rngs: the `params` stream draws the weights: normal(0, initializer_range), norms 1, biases 0.
      execution: dtypes, attention implementation, rematerialization, scan.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        execution: Execution = TRAINING,
    ):
        param_dtype = execution.param_dtype
        V, D, std = config.vocab_size, config.hidden_size, config.initializer_range
        self.config = config
        self.execution = execution
        self.embed_VD = normal(rngs, (V, D), (None, "table"), std, param_dtype)
        if 0 <= config.pad_token_id < V:
            self.embed_VD[...] = self.embed_VD[...].at[config.pad_token_id].set(0)

        def block(rngs):
            made = Block(config, rngs=rngs, param_dtype=param_dtype, lora=execution.lora)
            return made if execution.quantize is None else quantize_block(made, execution.quantize)

        layers = rngs.split(config.num_layers)
        # One layer at a time where it is quantized: only its weights are in memory unquantized.
        one_by_one = execution.quantize is not None
        self.blocks = jax.lax.map(block, layers) if one_by_one else jax.vmap(block)(layers)
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
        """Compute logits of the next token, fp32; arguments as for `hidden`, and split as they are.

        Memory: 4 * B * T * V bytes, 12 GB for 32k tokens and 92,544 ids. Training uses `hidden`
        and `unembedding` in chunks instead.
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
        dropout: Key[Array, ""] | None = None,
    ) -> Float[Array, "B T D"]:
        """Compute the final hidden states (after the last norm), the input of the LM head.

        Args:
          tokens_BT: ids in 0 .. V - 1; B is a multiple of the mesh's data and fsdp axes, T of its
            seq axis.
          positions: position of each token in its document; None: counted from the start of each
            run of equal segment ids, or of the row.
          segment_ids: document of each token, 0 for padding; None: one document a row.
          dropout: random key of the adapters' dropout, in training; None: no dropout.

        Returns:
          Hidden states [B, T, D] in the compute dtype.
        """
        with sharding.mesh_of(self.norm_D[...]):
            tokens, positions, segments = self._place_inputs(tokens_BT, positions, segment_ids)
            mask, options = self.prepare_mask(tokens.shape, segments), self.execution

            def attend(q_BTNH, k_BTKH, v_BTKH, _):
                out_BTNH = attention(
                    q_BTNH,
                    k_BTKH,
                    v_BTKH,
                    mask,
                    impl=options.attn,
                    deterministic=options.deterministic,
                )
                return out_BTNH, None

            rope = rope_table(positions, self.config, segment_ids=segments)
            x_BTD, _ = self.run_blocks(
                self.embed(tokens),
                rope,
                attend,
                scan=options.scan,
                matmul=options.matmul,
                tile_size=options.tile_size,
                dropout=dropout,
            )
            return x_BTD

    def prepare_mask(self, shape: tuple[int, ...], segment_ids: Int[Array, "B T"] | None) -> Mask:
        """Prepare the causal mask of a batch [B, T] and the metadata that all layers share."""
        c = self.config
        q_BTNH, k_BTKH = (
            sharding.struct(
                (*shape, heads, c.head_dim), self.execution.dtype, "batch", "seq", "heads", None
            )
            for heads in (c.num_heads, c.num_kv_heads)
        )
        return prepare(Mask(segment_ids=segment_ids), q_BTNH, k_BTKH, impl=self.execution.attn)

    def embed(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Look up token embeddings in the compute dtype; padding gets no gradient."""
        table_VD = sharding.gathered(self.embed_VD[...], None, "table")
        T = sharding.positions(tokens_BT)
        x_BTD = sharding.take_rows(table_VD, tokens_BT, "batch", T, "table_in_use")
        x_BTD = sharding.constrain(x_BTD.astype(self.execution.dtype), "batch", T, None)
        is_pad_BT1 = (tokens_BT == self.config.pad_token_id)[..., None]
        return jnp.where(is_pad_BT1, jax.lax.stop_gradient(x_BTD), x_BTD)

    def run_blocks(
        self,
        x_BTD: Float[Array, "B T D"],
        rope: Rope,
        attend: Attend,
        layer_caches: Sequence[Any] | None = None,
        *,
        scan: bool = True,
        matmul: str = "bf16",
        tile_size: int | None = None,
        dropout: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Apply all layers and the final norm, for training, prefill and decoding.

        Args:
          x_BTD: token embeddings in the compute dtype.
          rope: cos and sin from `rope_table`.
          attend: attention function of each block.
          layer_caches: one item for each layer, passed to its `attend`, or None; must be None with
            `scan`.
          scan: as in `Execution`, like matmul and tile_size. The results are the same.
          matmul: "bf16" or "fp8".
          tile_size: tokens of a tile; None: no tiles.
          dropout: random key of the adapters' dropout; None: no dropout.

        Returns:
          Final hidden states [B, T, D], and the second results of `attend`: stacked [L, ...] with
          `scan`, else a list of L.
        """
        L, policies = self.config.num_layers, remat_policies(self.execution.remat)
        keys_L = None if dropout is None else jax.random.split(dropout, L)

        def layer(x_BTD, block, layer_cache, key):
            x_BTD = checkpoint_name(x_BTD, "block_input")
            return block(
                x_BTD,
                rope,
                attend,
                layer_cache,
                matmul=matmul,
                tile_size=tile_size,
                dropout=dropout_keys(key),
            )

        blocks = cast_weights(self.blocks, self.execution.dtype)
        if scan:
            assert layer_caches is None, "a scan would copy each layer's cache out of a stack"
            x_BTD, results = self._scan(layer, policies, x_BTD, (blocks, keys_L))
        else:
            caches, results = layer_caches or [None] * L, []
            keys = [None] * L if keys_L is None else list(keys_L)
            layers = [jax.checkpoint(layer, policy=policy) for policy in policies]
            halves = self._trained_and_frozen(blocks)
            for i, ((trained, frozen), cache, key) in enumerate(
                zip(halves, caches, keys, strict=True)
            ):
                x_BTD, trained = grad_barrier(x_BTD, trained)
                block = combine(trained, frozen)
                x_BTD, result = layers[i % len(layers)](x_BTD, block, cache, key)
                results.append(result)
        return rms_norm(x_BTD, self.norm_D[...], eps=self.config.rms_norm_eps), results

    def _scan(self, layer, policies, x_BTD, stacks):
        """Run the layers as one loop, over groups of as many layers as there are policies."""
        L, G = self.config.num_layers, len(policies)
        if G == 1:
            one = jax.checkpoint(layer, policy=policies[0])
            return jax.lax.scan(lambda x, xs: one(x, xs[0], None, xs[1]), x_BTD, stacks)

        def element(i, x_BTD, stack, keys):
            # Taken here, it is not saved: under a scan that would copy all weights.
            block, key = jax.tree.map(lambda a: a[i], (stack, keys))
            trained, frozen = partition(block, trained=self._trained_type)
            x_BTD, trained = grad_barrier(x_BTD, trained)
            return layer(x_BTD, combine(trained, frozen), None, key)

        def group(x_BTD, xs):
            results = []
            for i, policy in enumerate(policies):
                one = jax.checkpoint(functools.partial(element, i), policy=policy)
                x_BTD, result = one(x_BTD, *xs)
                results.append(result)
            return x_BTD, results

        groups = jax.tree.map(lambda a: a.reshape(L // G, G, *a.shape[1:]), stacks)
        x_BTD, results = jax.lax.scan(group, x_BTD, groups)
        joined = jax.tree.map(lambda *r: jnp.stack(r, 1).reshape(L, *r[0].shape[1:]), *results)
        return x_BTD, joined

    @property
    def _trained_type(self) -> type[nnx.Variable]:
        return nnx.Param if self.execution.lora is None else LoRAParam

    def _trained_and_frozen(self, blocks: Any) -> list[tuple[Any, Any]]:
        """Return each layer's block in two halves: its trained weights, and its frozen ones."""
        if isinstance(blocks, nnx.List):  # for decoding, unstacked once for all tokens
            return [partition(block, trained=self._trained_type) for block in blocks]
        trained, frozen = partition(blocks, trained=self._trained_type)
        L = self.config.num_layers
        frozen_L = [jax.tree.map(operator.itemgetter(i), frozen) for i in range(L)]
        return list(zip(unstack(trained, L), frozen_L, strict=True))

    def unembedding(self) -> Float[Array, "D V"]:
        """Return the output matrix in the compute dtype, gathered, split over tensor."""
        with sharding.mesh_of(self.norm_D[...]):
            if self.config.tie_word_embeddings:
                table_VD = sharding.gathered(
                    self.embed_VD[...].astype(self.execution.dtype), None, "table"
                )
                return sharding.constrain(table_VD.T, None, "vocab")
            return sharding.gathered(
                self.output_DV[...].astype(self.execution.dtype), "embed", "vocab"
            )

    def _place_inputs(
        self, tokens_BT: Ids, positions: Ids | None, segment_ids: Ids | None
    ) -> tuple[Array, Array, Array | None]:
        """Convert the inputs to jax arrays split over the mesh, with default positions.

        Only tokens are split along T: positions and lengths of documents are counted over rows.

        Raises:
          ValueError: the tokens have another number of axes, or are no integers.
        """
        tokens_BT = jnp.asarray(tokens_BT)
        if tokens_BT.ndim != 2 or not jnp.issubdtype(tokens_BT.dtype, jnp.integer):
            raise ValueError(
                f"tokens have shape {tokens_BT.shape} and dtype {tokens_BT.dtype}, must be "
                "integers with 2 axes: batch, pos"
            )

        def place(ids):
            return sharding.constrain(jnp.asarray(ids), "batch", None)

        tokens_BT = sharding.constrain(tokens_BT, "batch", "seq")
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
    """Multiply hidden states by the output matrix, accumulated and returned in fp32."""
    return sharding.einsum(
        "BTD,DV->BTV",
        x_BTD,
        w_DV,
        out=("batch", sharding.positions(x_BTD), "vocab"),
        preferred_element_type=jnp.float32,
    )


def init(
    config: ModelConfig,
    *,
    seed: int | Int[Array, ""] = 0,
    mesh: jax.sharding.Mesh | None = None,
    execution: Execution = TRAINING,
) -> InternLM2:
    """Create a model with random weights, sharded over a mesh.

    No device holds more than its own shards: the weights are drawn inside one jit with sharded
    outputs. The weights do not depend on the mesh.

    Args:
      config: the architecture.
      seed: seed of the weights.
      mesh: devices to shard the weights over; None: the default device.
      execution: dtypes, attention implementation, rematerialization, scan.

    Raises:
      ValueError: the mesh does not divide the model.
    """
    return _created(
        lambda: InternLM2(config, rngs=nnx.Rngs(params=seed), execution=execution), mesh
    )


def with_new_adapters(
    model: InternLM2,
    *,
    seed: int | Int[Array, ""] = 0,
    mesh: jax.sharding.Mesh | None = None,
) -> InternLM2:
    """Return the model with new adapters, if its `execution.lora` asks for adapters.

    The adapters are those that `init` draws from the same seed.
    """
    if model.execution.lora is None:
        return model

    def adapters():  # the other weights are not computed: nothing uses them
        new = InternLM2(model.config, rngs=nnx.Rngs(params=seed), execution=model.execution)
        return nnx.state(new, LoRAParam)

    graphdef, _, others = nnx.split(model, LoRAParam, ...)
    return nnx.merge(graphdef, _created(adapters, mesh), others)


def _created(create: Callable[[], Any], mesh: jax.sharding.Mesh | None) -> Any:
    """Run a function that makes parameters, which are sharded over the mesh as they are made."""
    if mesh is None:
        return jax.jit(create)()
    placed = sharding.shardings(jax.eval_shape(create), mesh)
    # Without a current mesh the compiler shards the drawing by the shardings of the outputs; with
    # an explicit mesh every intermediate array would be whole on every device.
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        return jax.jit(create, out_shardings=placed)()
