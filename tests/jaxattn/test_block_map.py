"""The kernels' work lists against brute force from the dense mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxattn import Mask
from jaxattn.block_map import (
    ALIGN,
    SENTINEL,
    BlockMap,
    Tiling,
    key_map,
    query_map,
    stride,
)
from jaxattn.block_map import WorkField as W
from jaxattn.mask import BLOCK

pytestmark = pytest.mark.usefixtures("compile_quickly")

# Small tiles, so that small masks have many: a group of rows, groups in a tile, a column tile.
GROUP, GROUPS, COLS, REPEAT = 8, 2, 16, 3
Q_TILING = Tiling(group_rows=GROUP, groups=GROUPS, block_cols=COLS, repeat=REPEAT)
K_TILING = Tiling(group_rows=GROUP, groups=1, block_cols=COLS)
B, T, S = 2, 75, 90
BLOCK_MAPS = {
    "queries": jax.jit(
        lambda mask, s: query_map(mask, B, T, s, Q_TILING),
        static_argnums=1,
    ),
    "keys": jax.jit(
        lambda mask, s: key_map(mask, B, T, s, K_TILING),
        static_argnums=1,
    ),
}
RESTRICTIONS = [(True, None), (False, None), (True, 13), (False, 29)]


def random_ids(rng: np.random.Generator, length: int, contiguous: bool) -> np.ndarray:
    """Draw runs of documents and padding; if not contiguous, ids return after others."""
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


def dense(mask: Mask, s: int, side: str, t: int = T) -> np.ndarray:
    """Return which row sees which column, batch rows end to end: bool [B * rows, B * columns]."""
    visible = np.broadcast_to(np.asarray(mask.visible(t, s)), (B, t, s))
    visible = np.pad(visible, ((0, 0), (0, stride(mask, t) - t), (0, stride(mask, s) - s)))
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
            row = (fields[g, W.ROW_TILE] * groups + g) * GROUP
            yield fields[g], padded[row : row + GROUP], (at, g)


def tile_starts(found: BlockMap, fields: np.ndarray) -> list[int]:
    """First column of each tile that the kernel visits for this row of the work list."""
    at, tiles = fields[W.START], range(fields[W.COUNT])
    if found.cols is None:
        assert at % ALIGN == 0
        return [at + t * COLS for t in tiles]
    return [int(np.asarray(found.cols)[at + t]) for t in tiles]


def check(found: BlockMap, mask: Mask, s: int, side: str, t: int = T) -> None:
    """Live tiles hold all pairs, each once, and what the kernel masks inside is right."""
    for fields, rows, (at, g) in row_groups(found, side, dense(mask, s, side, t)):
        starts = tile_starts(found, fields)
        assert len(set(starts)) == len(starts)
        assert 0 <= fields[W.LIVE_FROM] < fields[W.LIVE_TO] <= fields[W.COUNT]
        assert -(-fields[W.COLUMNS] // COLS) == fields[W.COUNT]
        assert 0 < fields[W.LIVE_COLUMNS] <= min(fields[W.COLUMNS], fields[W.LIVE_TO] * COLS)
        live = range(fields[W.LIVE_FROM], fields[W.LIVE_TO])
        ends = np.minimum(COLS, fields[W.LIVE_COLUMNS] - COLS * np.arange(fields[W.COUNT]))
        in_live = sum(rows[:, starts[t] : starts[t] + max(ends[t], 0)].sum() for t in live)
        assert rows.sum() == in_live, f"{mask.kind}: a visible pair is not live"
        first, last = np.asarray(found.row_bounds)[at, g][:, :GROUP]
        for t in live:
            cols = np.arange(starts[t], starts[t] + COLS)
            kept = np.ones((GROUP, COLS), bool)
            if t < fields[W.FULL_FROM]:
                kept &= cols >= first[:, None]
                if fields[W.BY_ID]:
                    ids, col_ids = np.asarray(found.row_ids)[at, g], np.asarray(found.col_ids)
                    kept &= ids[:GROUP, None] == col_ids[cols]
            if t >= fields[W.FULL_TO]:
                kept &= cols <= last[:, None]
            want = rows[:, cols[0] : cols[0] + COLS]
            np.testing.assert_array_equal(kept, want, f"{mask.kind}: tile {t} of {fields}")


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "any order"])
@pytest.mark.parametrize("side", ["queries", "keys"])
def test_every_visible_pair_is_live_and_full_tiles_are_full(side, contiguous):
    """The kernel's result follows: live tiles hold all pairs, and what it masks inside is right."""
    for mask, s in masks(contiguous):
        check(BLOCK_MAPS[side](mask, s), mask, s, side)


# (T, S, causal, window, documents): few, since each is compiled once. Ragged, square and not, with
# room for whole tiles between two holes.
PATTERN_CASES = [
    (300, 300, True, None, True),
    (300, 300, True, 13, False),
    (140, 390, False, 150, True),
    (390, 140, True, None, False),
]


@st.composite
def patterns(draw) -> tuple[Mask, int, int]:
    """(mask, T, S): a random pattern with holes, empty rows and columns, under all else."""
    t, s, causal, window, documents = draw(st.sampled_from(PATTERN_CASES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    blocks = rng.random((B, -(-t // BLOCK), -(-s // BLOCK))) < draw(
        st.sampled_from([0.2, 0.5, 0.9])
    )
    ids = {}
    if documents:
        contiguous = draw(st.booleans())
        for name, length in (("segment_ids", t), ("kv_segment_ids", s)):
            if t != s or name == "segment_ids":
                rows = [random_ids(rng, length, contiguous) for _ in range(B)]
                ids[name] = jnp.asarray(np.stack(rows))
    return Mask(**ids, causal=causal, window=window, blocks=jnp.asarray(blocks)), t, s


def pattern_map(mask: Mask, t: int, s: int, side: str) -> BlockMap:
    if side == "queries":
        return query_map(mask, B, t, s, Q_TILING)
    return key_map(mask, B, t, s, K_TILING)


PATTERN_MAP = jax.jit(pattern_map, static_argnums=(1, 2, 3))


@pytest.mark.parametrize("side", ["queries", "keys"])
@settings(max_examples=40, deadline=None)
@given(patterns())
def test_patterns_with_holes(side, drawn):
    """Listed tiles hold every visible pair once, and none of them lies in a hole."""
    mask, t, s = drawn
    found = PATTERN_MAP(mask, t, s, side)
    check(found, mask, s, side, t)
    pattern = np.asarray(mask.blocks)
    pattern = pattern if side == "queries" else pattern.transpose(0, 2, 1)
    rows_of_tile = GROUP * (GROUPS if side == "queries" else 1)
    for fields in np.asarray(found.work)[:, 0]:
        batch, row = divmod(fields[W.ROW_TILE] * rows_of_tile // BLOCK, pattern.shape[1])
        starts = np.array(tile_starts(found, fields)) - batch * pattern.shape[2] * BLOCK
        live = pattern[batch, row, starts // BLOCK]
        assert live.all() or live.size == 1, "a dead tile only where one stands for none"


def test_a_pattern_of_all_blocks_costs_at_most_a_tile():
    """Tiles lie on its grid then, not where the first document of a row tile begins."""
    ids = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 9, (B, 256)), axis=1), jnp.int32)
    plain = PATTERN_MAP(Mask(segment_ids=ids), 256, 256, "keys").work
    full = Mask(segment_ids=ids, blocks=jnp.ones((2, 2), bool))
    listed = PATTERN_MAP(full, 256, 256, "keys").work
    assert 0 <= listed[:, 0, W.COUNT].sum() - plain[:, 0, W.COUNT].sum() <= len(plain)


@pytest.mark.parametrize(("group", "tile"), [(8, 256), (8, 96), (24, 64), (128, 64)])
def test_patterns_need_tiles_that_divide_their_blocks(group, tile):
    """One line with the tile's size, before anything is compiled."""
    mask = Mask(blocks=jnp.ones((2, 2), bool))
    with pytest.raises(NotImplementedError, match=f"{2 * group} x {tile} .*impl='xla'"):
        query_map(mask, 1, 256, 256, Tiling(group_rows=group, groups=2, block_cols=tile))


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
            tiles = range(fields[W.LIVE_FROM], fields[W.LIVE_TO])
            starts = [fields[W.START] + t * COLS for t in tiles]
            live = [rows[:, start : start + COLS].any() for start in starts]
            assert all(live) or (len(live) == 1 and not rows.any()), mask.kind
            if rows.any():
                assert (
                    np.flatnonzero(rows.any(axis=0))[-1] + 1 - fields[W.START]
                    == fields[W.LIVE_COLUMNS]
                )


@pytest.mark.parametrize("side", ["queries", "keys"])
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "any order"])
def test_ends_and_by_id(side, contiguous):
    """Ends are the first and last column of each row's document that the index tests leave.

    W.BY_ID is set exactly for tiles with a row whose document has other tokens in between.
    """
    for mask, s in masks(contiguous):
        found = BLOCK_MAPS[side](mask, s)
        ids, key_ids = mask.segment_ids, mask.key_ids
        if ids is None:
            assert not np.asarray(found.work)[..., W.BY_ID].any()
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
            tile = slice(
                fields[0, W.ROW_TILE] * rows_of_tile, (fields[0, W.ROW_TILE] + 1) * rows_of_tile
            )
            assert (fields[:, W.BY_ID] == interrupted[tile].any()).all(), mask.kind
        for _, rows, (at, g) in row_groups(found, side, dense(mask, s, side)):
            first, last = np.asarray(found.row_bounds)[at, g][:, :GROUP]
            for row, a, b in zip(rows, first, last, strict=True):
                seen = np.flatnonzero(row)
                if contiguous and seen.size:
                    assert (a, b) == (seen[0], seen[-1])
                elif seen.size:  # with holes the window may end in one
                    assert a <= seen[0] and b >= seen[-1]
                else:
                    assert contiguous is False or (a, b) == (SENTINEL, -1)


def test_longest_tiles_come_first_and_each_once():
    for mask, s in masks(contiguous=True):
        for side in BLOCK_MAPS:
            work = np.asarray(BLOCK_MAPS[side](mask, s).work)
            assert (np.diff(work[:, 0, W.COUNT]) <= 0).all()
            assert sorted(work[:, 0, W.ROW_TILE]) == list(range(len(work)))
            assert (
                work[..., : W.BY_ID + 1] == work[:, :1, : W.BY_ID + 1]
            ).all()  # shared by groups


def test_repeat_copies_the_rows_for_each_head():
    """Heads that share a tile see the same columns: their rows follow one another."""
    mask, s = next(masks(contiguous=True))
    found = BLOCK_MAPS["queries"](mask, s)
    for x in (found.row_bounds, found.row_ids):
        assert x.shape[-1] == REPEAT * GROUP
        parts = np.split(np.asarray(x), REPEAT, axis=-1)
        for part in parts[1:]:
            np.testing.assert_array_equal(part, parts[0])


@pytest.mark.parametrize("length", [1_000, 32_768])
def test_memory_is_linear(length):
    """Bytes grow with T, not with T squared: at most 64 a token, where a row of pairs has T."""
    mask = Mask(segment_ids=jnp.ones((1, length), jnp.int32))
    tiling = Tiling(group_rows=16, groups=2, block_cols=128, repeat=4)
    sizes = jax.eval_shape(
        lambda mask: query_map(mask, 1, length, length, tiling),
        mask,
    )
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(sizes)) <= 64 * length
