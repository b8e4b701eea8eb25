"""The shapes of the bench: useful work counted right, documents as in the peers' table."""

import numpy as np
import pytest

from jaxattn.bench.shapes import SHAPES, Shape, document_lengths

SMALL = {
    "causal": Shape(batch=1, length=64, heads=2, kv_heads=1),
    "packed": Shape(batch=2, length=96, heads=2, kv_heads=2, documents=(20.0, 1.0), window=9),
}


@pytest.mark.parametrize("shape", SMALL.values(), ids=SMALL)
def test_pairs_are_the_visible_ones(shape):
    """Useful pairs are exactly those that the mask shows."""
    visible = shape.mask().visible(shape.length, shape.length)
    assert shape.pairs() == int(np.broadcast_to(visible, (shape.batch, *visible.shape[1:])).sum())


@pytest.mark.parametrize(
    ("name", "documents", "longest"),
    [
        ("7b_32k_packed", 20, 5526),
        ("7b_32k_packed_short", 68, 1679),
        ("7b_32k_packed_sft", 186, 572),
    ],
)
def test_document_lengths_are_those_of_the_peers_table(name, documents, longest):
    """The same documents that other implementations were measured on."""
    lengths = document_lengths(SHAPES[name].length, *SHAPES[name].documents)
    assert (len(lengths), max(lengths), sum(lengths)) == (documents, longest, 32768)
