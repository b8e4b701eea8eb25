"""Live column tiles of a block pattern, as lists that a kernel can loop over.

The visible columns of a row are one range, and a pattern cuts holes into it. But counting live
tiles is monotone: in the ordered list of a pattern row's live tiles, the tiles of a range are
neighbors. So each row of the pattern gets the list of its live column tiles, and a range of
columns becomes a range of that list. Work lists stay ranges under every pattern.

B batch, P pattern rows of BLOCK rows, Q pattern columns of BLOCK columns; W column tiles of a
batch row, Q * BLOCK / tile.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxattn.mask import BLOCK


@dataclasses.dataclass(frozen=True, kw_only=True)
class LiveTiles:
    """Live column tiles of every row of a pattern.

    Attributes:
      cols_BPW: first column of each live tile, within its batch row and in order; after them the
        dead tiles.
      before_BPW: live tiles before each tile, and before the end: W + 1 of them.
      tile: columns in a tile.
    """

    cols_BPW: Int[Array, "B P W"]
    before_BPW: Int[Array, "B P W+1"]
    tile: int

    def listed(
        self, first_BR: Int[Array, "B R"], last_BR: Int[Array, "B R"]
    ) -> tuple[Int[Array, "B R"], Int[Array, "B R"]]:
        """Convert ranges of columns, first to last of each row, to ranges of live columns.

        A range is empty if first_BR is above last_BR. Columns beyond the batch row are cut.

        Returns:
          (first, last), counted in live columns only: tile n of the list begins at n * tile. If
          no tile of the range is live, first > last.
        """
        return self._live_before(first_BR), self._live_before(last_BR + 1) - 1

    def _live_before(self, column_BR: Int[Array, "B R"]) -> Int[Array, "B R"]:
        """Count the live columns before a column, in the pattern row of each row."""
        _, P, W = self.cols_BPW.shape
        column_BR = jnp.clip(column_BR, 0, W * self.tile)
        tile_BR = column_BR // self.tile
        list_1R = jnp.arange(column_BR.shape[1])[None] // BLOCK
        before_BX = self.before_BPW.reshape(-1, P * (W + 1))
        here_BR, next_BR = (
            jnp.take_along_axis(before_BX, list_1R * (W + 1) + at_BR, axis=1)
            for at_BR in (tile_BR, jnp.minimum(tile_BR + 1, W))
        )
        return here_BR * self.tile + jnp.where(next_BR > here_BR, column_BR % self.tile, 0)


def live_tiles(blocks_BPQ: Bool[Array, "B P Q"], tile: int) -> LiveTiles:
    """List the live tiles of each row of a pattern; `tile` must divide BLOCK."""
    live_BPW = jnp.repeat(blocks_BPQ, BLOCK // tile, axis=2)
    before_BPW = jnp.cumsum(live_BPW, axis=2, dtype=jnp.int32)
    order_BPW = jnp.argsort(~live_BPW, axis=2, stable=True).astype(jnp.int32)
    return LiveTiles(
        cols_BPW=order_BPW * tile,
        before_BPW=jnp.pad(before_BPW, ((0, 0), (0, 0), (1, 0))),
        tile=tile,
    )
