"""The names of matrices are those of the model's blocks."""

import jax
from flax import nnx

from models.config import PRESETS
from models.internlm2 import InternLM2
from models.matrices import MATRICES, is_norm_or_bias


def test_every_matrix_of_a_block_is_listed():
    """Renaming a parameter of a block without its entry here fails."""
    model = jax.eval_shape(lambda: InternLM2(PRESETS["nano"], rngs=nnx.Rngs(0)))
    blocks = nnx.to_pure_dict(nnx.state(model.blocks))
    names = {str(p[-1].key) for p, _ in jax.tree_util.tree_leaves_with_path(blocks)}
    assert {n for n in names if not is_norm_or_bias(n)} == MATRICES.keys()
