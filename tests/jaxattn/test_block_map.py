"""The kernels' work lists against brute force from the dense mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import Mask
from jaxattn.block_map import (
    ALIGN,
    BY_ID,
    COUNT,
    FULL_FROM,
    FULL_TO,
    LIVE_FROM,
    LIVE_TO,
    NEVER,
    START,
    TILE,
    BlockMap,
    key_map,
    query_map,
)

# Small tiles, so that small masks have many: a group of rows, groups in a tile, a column tile.
GROUP, GROUPS, COLS, REPEAT = 8, 2, 16, 3
B, T, S = 2, 75, 90
BLOCK_MAPS = {
    "queries": jax.jit(
        lambda mask, s: query_map(
            mask, B, T, s, group=GROUP, groups=GROUPS, tile=COLS, repeat=REPEAT
        ),
        static_argnums=1,
    ),
    "keys": jax.jit(
        lambda mask, s: key_map(mask, B, T, s, group=GROUP, groups=1, tile=COLS),
        static_argnums=1,
    ),
}
RESTRICTIONS = [(True, None), (False, None), (True, 13), (False, 29)]


def random_ids(rng: np.random.Generator, length: int, contiguous: bool) -> np.ndarray:
    """Runs of documents and padding; where not contiguous, ids come back after others."""
    cuts = np.sort(rng.choice(np.arange(1, length), rng.integers(0, 9), replace=False))
    runs = np.diff(np.concatenate([[0], cuts, [length]]))
    names = rng.permutation(np.arange(len(runs))) if contiguous else rng.integers(0, 4, len(runs))
    return np.repeat(names, runs).astype(np.int32)


def masks(contiguous: bool):
    """(mask, S): random documents under every restriction; other ids for the keys if T != S."""
    rng = np.random.default_rng(7 if contiguous else 8)
    for causal, window in RESTRICTIONS:
        for round_ in range(4):
            ids = np.stack([random_ids(rng, T, contiguous) for _ in range(B)])
            if round_ == 0:
                ids[0] = 0  # a row of padding
            if round_ % 2:
                kv_ids = np.stack([random_ids(rng, S, contiguous) for _ in range(B)])
                ids_of = {"segment_ids": jnp.asarray(ids), "kv_segment_ids": jnp.asarray(kv_ids)}
                yield Mask(**ids_of, causal=causal, window=window), S
            else:
                yield Mask(segment_ids=jnp.asarray(ids), causal=causal, window=window), T
        yield Mask(causal=causal, window=window), S


def dense(mask: Mask, s: int, side: str) -> np.ndarray:
    """What rows see of columns, all batch rows end to end: bool [B * rows, B * columns]."""
    visible = np.broadcast_to(np.asarray(mask.visible(T, s)), (B, T, s))
    if side == "keys":
        visible = visible.transpose(0, 2, 1)
    rows, cols = visible.shape[1:]
    whole = np.zeros((B * rows, B * cols), bool)
    for b in range(B):
        whole[b * rows : (b + 1) * rows, b * cols : (b + 1) * cols] = visible[b]
    return whole


def row_groups(found: BlockMap, side: str, whole: np.ndarray):
    """(fields of the group, its rows of the dense mask padded with nothing seen, its index)."""
    groups = GROUPS if side == "queries" else 1
    work = np.asarray(found.work)
    padded = np.zeros((len(work) * groups * GROUP, whole.shape[1] + 2 * COLS), bool)
    padded[: len(whole), : whole.shape[1]] = whole
    for at, fields in enumerate(work):
        for g in range(groups):
            row = (fields[g, TILE] * groups + g) * GROUP
            yield fields[g], padded[row : row + GROUP], (at, g)


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "any order"])
@pytest.mark.parametrize("side", ["queries", "keys"])
def test_every_visible_pair_is_live_and_full_tiles_are_full(side, contiguous):
    """The kernel's result follows: live tiles hold all pairs, and what it masks inside is right."""
    for mask, s in masks(contiguous):
        found = BLOCK_MAPS[side](mask, s)
        whole = dense(mask, s, side)
        for fields, rows, (at, g) in row_groups(found, side, whole):
            start = fields[START]
            assert start % ALIGN == 0
            assert 0 <= fields[LIVE_FROM] < fields[LIVE_TO] <= fields[COUNT]
            live = slice(start + fields[LIVE_FROM] * COLS, start + fields[LIVE_TO] * COLS)
            assert rows.sum() == rows[:, live].sum(), f"{mask.kind}: a visible pair is not live"
            first, last = np.asarray(found.ends)[at, g][:, :GROUP]
            for t in range(fields[LIVE_FROM], fields[LIVE_TO]):
                cols = np.arange(start + t * COLS, start + (t + 1) * COLS)
                kept = np.ones((GROUP, COLS), bool)
                if t < fields[FULL_FROM]:
                    kept &= cols >= first[:, None]
                    if fields[BY_ID]:
                        ids, col_ids = np.asarray(found.row_ids)[at, g], np.asarray(found.col_ids)
                        kept &= ids[:GROUP, None] == col_ids[cols]
                if t >= fields[FULL_TO]:
                    kept &= cols <= last[:, None]
                want = rows[:, cols[0] : cols[0] + COLS]
                np.testing.assert_array_equal(kept, want, f"{mask.kind}: tile {t} of {fields}")


@pytest.mark.parametrize("side", ["queries", "keys"])
def test_ranges_of_contiguous_documents_are_tight(side):
    """Each tile that a group visits holds a pair it sees, if it sees any at all.

    Without a window, or other ids for the keys: those may leave a hole between what the first and
    the last row of a group see.
    """
    for mask, s in masks(contiguous=True):
        if mask.window is not None or mask.kv_segment_ids is not None:
            continue
        for fields, rows, _ in row_groups(BLOCK_MAPS[side](mask, s), side, dense(mask, s, side)):
            tiles = range(fields[LIVE_FROM], fields[LIVE_TO])
            starts = [fields[START] + t * COLS for t in tiles]
            live = [rows[:, start : start + COLS].any() for start in starts]
            assert all(live) or (len(live) == 1 and not rows.any()), mask.kind


@pytest.mark.parametrize("side", ["queries", "keys"])
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "any order"])
def test_ends_and_by_id(side, contiguous):
    """Ends are the first and last column of each row's document that the index tests leave.

    BY_ID is set exactly for tiles with a row whose document has other tokens in between.
    """
    for mask, s in masks(contiguous):
        found = BLOCK_MAPS[side](mask, s)
        ids, key_ids = mask.segment_ids, mask.key_ids
        if ids is None:
            assert not np.asarray(found.work)[..., BY_ID].any()
            assert found.row_ids is None and found.col_ids is None
            continue
        ids, other = (
            np.asarray(x) for x in ((ids, key_ids) if side == "queries" else (key_ids, ids))
        )
        interrupted = np.array(
            [
                [
                    x != 0 and np.unique(np.diff(np.flatnonzero(o == x))).tolist() not in ([], [1])
                    for x in i
                ]
                for i, o in zip(ids, other, strict=True)
            ]
        ).reshape(-1)
        rows_of_tile = GROUP * (GROUPS if side == "queries" else 1)
        work = np.asarray(found.work)
        for fields in work:
            tile = slice(fields[0, TILE] * rows_of_tile, (fields[0, TILE] + 1) * rows_of_tile)
            assert (fields[:, BY_ID] == interrupted[tile].any()).all(), mask.kind
        for _, rows, (at, g) in row_groups(found, side, dense(mask, s, side)):
            first, last = np.asarray(found.ends)[at, g][:, :GROUP]
            for row, a, b in zip(rows, first, last, strict=True):
                seen = np.flatnonzero(row)
                if contiguous and seen.size:
                    assert (a, b) == (seen[0], seen[-1])
                elif seen.size:  # with holes the window may end in one
                    assert a <= seen[0] and b >= seen[-1]
                else:
                    assert contiguous is False or (a, b) == (NEVER, -1)


def test_longest_tiles_come_first_and_each_once():
    for mask, s in masks(contiguous=True):
        for side in BLOCK_MAPS:
            work = np.asarray(BLOCK_MAPS[side](mask, s).work)
            assert (np.diff(work[:, 0, COUNT]) <= 0).all()
            assert sorted(work[:, 0, TILE]) == list(range(len(work)))
            assert (work[..., : BY_ID + 1] == work[:, :1, : BY_ID + 1]).all()  # shared by groups


def test_repeat_copies_the_rows_for_each_head():
    """Heads that share a tile see the same columns: their rows follow one another."""
    mask, s = next(masks(contiguous=True))
    found = BLOCK_MAPS["queries"](mask, s)
    for x in (found.ends, found.row_ids):
        assert x.shape[-1] == REPEAT * GROUP
        parts = np.split(np.asarray(x), REPEAT, axis=-1)
        for part in parts[1:]:
            np.testing.assert_array_equal(part, parts[0])


@pytest.mark.parametrize("length", [1_000, 32_768])
def test_memory_is_linear(length):
    """Bytes grow with T, not with T squared: at most 64 a token, where a row of pairs has T."""
    mask = Mask(segment_ids=jnp.ones((1, length), jnp.int32))
    sizes = jax.eval_shape(
        lambda mask: query_map(mask, 1, length, length, group=16, groups=2, tile=128, repeat=4),
        mask,
    )
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(sizes)) <= 64 * length
