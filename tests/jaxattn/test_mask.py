"""The mask's meaning, printed and sliced, and what it refuses."""

import dataclasses

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


def test_blocks_hide_128_by_128_tokens():
    """The picture of the docstring, one character a block: full, causal half or hidden."""
    blocks = np.eye(4, dtype=bool) | (np.arange(4) == 0)
    for mask, want in (
        (Mask(), ["h...", "#h..", "##h.", "###h"]),
        (Mask(blocks=jnp.asarray(blocks), causal=False), ["#...", "##..", "#.#.", "#..#"]),
        (Mask(blocks=jnp.asarray(blocks)), ["h...", "#h..", "#.h.", "#..h"]),
    ):
        tiles = np.asarray(mask.visible(512, 512))[0].reshape(4, 128, 4, 128).swapaxes(1, 2)
        half = np.tri(128, dtype=bool)
        letters = {
            half.tobytes(): "h",
            (~half & half).tobytes(): ".",
            (half | ~half).tobytes(): "#",
        }
        assert ["".join(letters[tile.tobytes()] for tile in row) for row in tiles] == want


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
def test_blocks_combine_by_and_and_are_sliced(per_row, traced):
    """With documents and a window, ragged, T and S different, by rule for one pair of tokens."""
    rng = np.random.default_rng(0)
    b, t, s = 2, 150, 300
    blocks = rng.random((b, 2, 3) if per_row else (2, 3)) < 0.5
    ids, kv_ids = (jnp.asarray(rng.integers(0, 3, (b, n)), jnp.int32) for n in (t, s))
    others = Mask(segment_ids=ids, kv_segment_ids=kv_ids, causal=False, window=100)
    mask = dataclasses.replace(others, blocks=jnp.asarray(blocks))
    mask.validate(b, t, s)
    i, j = np.arange(t)[:, None] // 128, np.arange(s)[None] // 128
    want = np.asarray(others.visible(t, s)) & blocks[..., i, j]
    np.testing.assert_array_equal(np.asarray(mask.visible(t, s)), want)
    part = jax.jit(lambda start: mask.visible(t, s, start=start, size=30))
    for start in (0, 110, 120):
        rows = part(start) if traced else mask.visible(t, s, start=start, size=30)
        np.testing.assert_array_equal(np.asarray(rows), want[:, start : start + 30])


def test_kind_says_what_restricts():
    assert Mask().kind == "causal"
    assert Mask(causal=False).kind == "full"
    assert Mask(segment_ids=IDS, window=7).kind == "causal + documents + window 7"
    assert Mask(blocks=jnp.ones((1, 1), bool), causal=False).kind == "blocks"


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
        (Mask(segment_ids=[[1, 1, 2, 2]]), "segment_ids is a list, must be an array: jnp.asarray"),
        (Mask(kv_segment_ids=IDS), "kv_segment_ids without segment_ids"),
        (Mask(segment_ids=IDS, kv_segment_ids=IDS[:, :3]), r"kv_segment_ids has shape \(1, 3\)"),
    ],
    ids=["window", "length", "batch", "list", "only kv", "kv length"],
)
def test_refuses(mask, message):
    """One line with the value and the bound, before anything is compiled."""
    with pytest.raises(ValueError, match=message):
        mask.validate(1, 4, 4)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((3, 2), bool, r"shape \(3, 2\), must be \(2, 3\) or \(4, 2, 3\): B=4, T=200 / 128"),
        ((200, 300), bool, r"shape \(200, 300\), must be \(2, 3\)"),
        ((1, 2), bool, r"shape \(1, 2\), must be"),  # rounded down
        ((1, 2, 3), bool, r"shape \(1, 2, 3\), must be"),
        ((6,), bool, r"shape \(6,\), must be"),
        ((4, 1, 2, 3), bool, r"shape \(4, 1, 2, 3\), must be"),
        ((2, 3), jnp.int32, "blocks has dtype int32, must be bool .for 0 and 1: blocks != 0"),
        ((4, 2, 3), jnp.float32, "blocks has dtype float32, must be bool"),
    ],
)
def test_refuses_blocks(shape, dtype, message):
    """A pattern transposed, of tokens, rounded down, of another batch, not of booleans."""
    with pytest.raises(ValueError, match=message) as error:
        Mask(blocks=jnp.ones(shape, dtype)).validate(4, 200, 300)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(2, 3), (4, 2, 3)])
def test_takes_blocks(shape):
    Mask(blocks=jnp.ones(shape, bool)).validate(4, 200, 300)
    Mask(blocks=np.ones(shape, bool)).validate(4, 256, 384)


def test_refuses_to_guess_the_keys_ids():
    with pytest.raises(ValueError, match="kv_segment_ids must be given because T=4 and S=6"):
        Mask(segment_ids=IDS).validate(1, 4, 6)
