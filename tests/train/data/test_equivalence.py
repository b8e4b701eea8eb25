"""Packed training is training on the documents one by one: same loss, same gradients."""

import dataclasses
import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxattn import attention, prepare
from models import internlm2
from models.execution import Execution
from models.internlm2 import init
from models.tokenizer import load_tokenizer
from tests.jaxattn.interpret import interpreted
from train.data.open import open_data
from train.data.pack.packing import Batch
from train.step.loss import cross_entropy


@pytest.mark.parametrize("attn", ["eager", "xla"])
def test_packed_rows_equal_single_documents(tiny, tmp_path, attn):
    """float32, 1e-5: a document's neighbors in its row leave no trace."""
    check(tiny, tmp_path, attn, texts=7, place=at_the_beginning)


def test_packed_rows_equal_single_documents_with_the_kernel(tiny, tmp_path, monkeypatch):
    """The same with the Pallas kernels, interpreted; they take 16 bits, all else is float32.

    A document alone stands where it stood in its row: at the row's beginning it would fall into
    other tiles, and its 16-bit results would be rounded elsewhere. That these differ by roundings
    alone is shown in tests/jaxattn/test_contract.py.
    """
    small = dataclasses.replace(tiny, hidden_size=128, num_heads=2, num_kv_heads=1, num_layers=1)

    def half(x):
        return jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)

    def attention_16(q, k, v, mask, **options):
        inputs = (x.astype(jnp.bfloat16) for x in (q, k, v))
        return attention(*inputs, mask, **options).astype(q.dtype)

    def prepare_16(mask, q, k, *, impl):
        return prepare(mask, half(q), half(k), impl=impl)

    monkeypatch.setattr(internlm2, "attention", attention_16)
    monkeypatch.setattr(internlm2, "prepare", prepare_16)
    # The interpreter cannot be rematerialized; that remat changes nothing is shown in tests/models.
    monkeypatch.setattr(jax, "checkpoint", lambda function, **_: function)
    with interpreted():
        check(small, tmp_path, "pallas", texts=3, place=in_its_place)


def check(config, tmp_path, attn: str, *, texts: int, place: Callable[[Batch, int], Batch]) -> None:
    """Compare loss and gradients of packed rows with those of their documents, one a row."""
    rows = [{"question": f"Q{i}", "answer": "answer " * (i % 4 + 1)} for i in range(texts)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    graphdef, state = nnx.split(init(config, execution=Execution(dtype=jnp.float32, attn=attn)))

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
        packed = list(loader.one_epoch())
        assert len(packed) < len(rows) == loader.report.documents
        count = loader.report.loss_tokens
    single = [place(batch, number) for batch in packed for number in range(1, batch_max(batch) + 1)]
    assert len(single) == len(rows)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a / count, b / count, rtol=1e-5, atol=1e-5),
        total(packed),
        total(single),
    )


def batch_max(batch: Batch) -> int:
    return int(batch.segment_ids.max())


def in_its_place(batch: Batch, number: int) -> Batch:
    """One document of the row, the rest of it padding."""
    here = batch.segment_ids == number
    return jax.tree.map(lambda field: np.where(here, field, 0).astype(field.dtype), batch)


def at_the_beginning(batch: Batch, number: int) -> Batch:
    """Move the document to the beginning of the row."""
    here = batch.segment_ids[0] == number

    def moved(field):
        row = np.zeros_like(field)
        row[0, : here.sum()] = field[0, here]
        return row

    only = jax.tree.map(moved, batch)
    only.segment_ids[only.segment_ids > 0] = 1
    return only
