"""The mask's meaning, printed and sliced, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import Mask


def picture(mask: Mask, t: int, s: int) -> list[str]:
    rows = np.asarray(mask.visible(t, s))[0]
    return ["".join("x" if seen else "." for seen in row) for row in rows]


IDS = jnp.asarray([[1, 1, 2, 0]], jnp.int32)


@pytest.mark.parametrize(
    ("mask", "want"),
    [
        (Mask(), ["x...", "xx..", "xxx.", "xxxx"]),
        (Mask(window=2), ["x...", "xx..", ".xx.", "..xx"]),
        (Mask(segment_ids=IDS), ["x...", "xx..", "..x.", "...."]),
        (Mask(causal=False), ["xxxx"] * 4),
        (Mask(causal=False, window=2), ["xx..", "xxx.", ".xxx", "..xx"]),
        (Mask(segment_ids=IDS, causal=False), ["xx..", "xx..", "..x.", "...."]),
        (Mask(segment_ids=jnp.asarray([[1, 2, 1, 1]])), ["x...", ".x..", "x.x.", "x.xx"]),
    ],
    ids=lambda x: x.kind if isinstance(x, Mask) else "",
)
def test_pictures(mask, want):
    """The examples of the docstring, and those that it leaves to the reader."""
    assert picture(mask, 4, 4) == want


def test_positions_count_from_the_start_of_the_row_when_t_and_s_differ():
    assert picture(Mask(), 2, 4) == ["x...", "xx.."]
    assert picture(Mask(), 4, 2) == ["x.", "xx", "xx", "xx"]
    mask = Mask(
        segment_ids=jnp.asarray([[2, 1]]), kv_segment_ids=jnp.asarray([[1, 2, 2]]), causal=False
    )
    assert picture(mask, 2, 3) == [".xx", "x.."]


@pytest.mark.parametrize("traced", [False, True])
def test_slices_are_parts_of_the_whole(traced):
    """Any slice of queries, its start traced or not, is those rows of the whole mask."""
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 3, (2, 11)), jnp.int32)
    mask = Mask(segment_ids=ids, window=4)
    whole = np.asarray(mask.visible(11, 11))
    part = jax.jit(lambda start: mask.visible(11, 11, start=start, size=3))
    for start in (0, 4, 8):
        rows = part(start) if traced else mask.visible(11, 11, start=start, size=3)
        np.testing.assert_array_equal(np.asarray(rows), whole[:, start : start + 3])


def test_kind_says_what_restricts():
    assert Mask().kind == "causal"
    assert Mask(causal=False).kind == "full"
    assert Mask(segment_ids=IDS, window=7).kind == "causal + documents + window 7"


def test_is_a_pytree_with_static_structure():
    """Ids are leaves; causal and window belong to the structure, so they select compiled code."""
    mask = Mask(segment_ids=IDS, window=3)
    leaves, structure = jax.tree.flatten(mask)
    assert len(leaves) == 1
    assert structure == jax.tree.structure(Mask(segment_ids=IDS + 1, window=3))
    assert structure != jax.tree.structure(Mask(segment_ids=IDS, window=4))
    assert structure != jax.tree.structure(Mask(segment_ids=IDS, window=3, causal=False))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Mask(window=0), "window=0 must be at least 1"),
        (Mask(segment_ids=jnp.ones((1, 5), jnp.int32)), r"segment_ids has shape \(1, 5\)"),
        (Mask(segment_ids=jnp.ones((2, 4), jnp.int32)), r"must be \(1, 4\)"),
        (Mask(kv_segment_ids=IDS), "kv_segment_ids without segment_ids"),
        (Mask(segment_ids=IDS, kv_segment_ids=IDS[:, :3]), r"kv_segment_ids has shape \(1, 3\)"),
    ],
    ids=["window", "length", "batch", "only kv", "kv length"],
)
def test_refuses(mask, message):
    """One line with the value and the bound, before anything is compiled."""
    with pytest.raises(ValueError, match=message):
        mask.validate(1, 4, 4)


def test_refuses_to_guess_the_keys_ids():
    with pytest.raises(ValueError, match="kv_segment_ids must be given because T=4 and S=6"):
        Mask(segment_ids=IDS).validate(1, 4, 6)
