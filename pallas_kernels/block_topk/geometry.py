"""Blocks of native sparse attention; all start at multiples of a fixed step, counted from key 0."""

from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels.types import ForcedKeys, Visible


class BlockGeometry(NamedTuple):
    """Compressed key i stands for keys [i * compress_stride, i * compress_stride + compress_block), selection block j for keys
    [j * select_block, (j + 1) * select_block).

    Fields: lengths in keys (l, d and l' in the paper), of which the stride divides the other two; of the `topk` selected blocks
    (n in the paper) the `n_initial` first visible ones and the `n_local` up to the query's own are always among them.
    """

    compress_block: int
    compress_stride: int
    select_block: int
    topk: int
    n_initial: int
    n_local: int

    def n_compressed(self, n_keys: int) -> int:
        """Compressed keys that lie within `n_keys` keys as a whole."""
        return max(0, (n_keys - self.compress_block) // self.compress_stride + 1)

    def n_blocks(self, n_keys: int) -> int:
        """Selection blocks that cover `n_keys` keys; the last may be ragged."""
        return -(-n_keys // self.select_block)

    @property
    def forced(self) -> ForcedKeys:
        """The selection blocks that are always among the selected ones."""
        return ForcedKeys(self.n_initial, self.n_local)

    def visible_blocks(self, visible: Visible) -> Visible:
        """The selection blocks that hold a visible key; `visible` with bounds within the keys."""
        first, own = visible.start // self.select_block, (visible.end - 1) // self.select_block
        return Visible(first, jnp.where(visible.some, own + 1, first))

    def compressed_range(self, visible: Visible) -> Visible:
        """The compressed keys that lie in each visible range as a whole, perhaps none."""
        first = -(-visible.start // self.compress_stride)
        end = (visible.end - self.compress_block) // self.compress_stride + 1
        return Visible(first, jnp.maximum(first, end))
