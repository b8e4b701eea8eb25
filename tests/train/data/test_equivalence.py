"""Packed training is training on the documents one by one: same loss, same gradients."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.internlm2 import init
from models.tokenizer import load_tokenizer
from train.data import Batch, open_data
from train.loss import cross_entropy


@pytest.mark.parametrize("attn", ["eager", "xla"])
def test_packed_rows_equal_single_documents(tiny, tmp_path, attn):
    """float32, 1e-5: a document's neighbours in its row leave no trace."""
    rows = [{"question": f"Q{i}", "answer": "answer " * (i % 4 + 1)} for i in range(7)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    graphdef, state = nnx.split(init(tiny, dtype=jnp.float32, attn=attn))

    @jax.jit
    def loss_and_grads(state, batch):
        def loss(state):
            model = nnx.merge(graphdef, state)
            x_BTD = model.hidden(
                batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids
            )
            return cross_entropy(x_BTD, model.unembedding(), batch.targets, batch.loss_mask)

        return jax.value_and_grad(loss)(state)

    def total(batches):
        each = [loss_and_grads(state, jax.tree.map(jnp.asarray, batch)) for batch in batches]
        return jax.tree.map(lambda *parts: sum(np.asarray(part) for part in parts), *each)

    with open_data([path], load_tokenizer("byte"), seq_len=128, batch_size=1) as loader:
        packed = list(loader.once())
        assert len(packed) < len(rows) == loader.report.documents
        count = loader.report.loss_tokens
    single = [alone(batch, number) for batch in packed for number in range(1, batch_max(batch) + 1)]
    assert len(single) == len(rows)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a / count, b / count, rtol=1e-5, atol=1e-5),
        total(packed),
        total(single),
    )


def batch_max(batch: Batch) -> int:
    return int(batch.segment_ids.max())


def alone(batch: Batch, number: int) -> Batch:
    """One document of the row, at the row's beginning, the rest of it padding."""
    here = batch.segment_ids[0] == number
    fields = []
    for field in batch:
        row = np.zeros_like(field)
        row[0, : here.sum()] = field[0, here]
        fields.append(row)
    only = Batch(*fields)
    only.segment_ids[only.segment_ids > 0] = 1
    return only
