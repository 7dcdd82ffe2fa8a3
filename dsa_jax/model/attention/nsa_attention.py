"""Native sparse attention as a function of heads: three branches, each over its own keys, added with their gates."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

from dsa_jax.config.implementations import Implementations
from dsa_jax.model.attention.attend import TOPK_NAME, AttentionOutput, attention_mass
from dsa_jax.model.attention.nsa import Branch, NSABranches
from dsa_jax.model.attention.visibility import mean_over_valid
from dsa_jax.parallel.ambient import ROWS, mean_over, per_device
from dsa_jax.parallel.mesh import BATCH_AXES
from dsa_jax.parallel.sequence import HEADS, gather_keys, key_spec
from pallas_kernels import BlockGeometry, Visible, block_topk, dense_attention, sparse_attention


class _PerQuery(NamedTuple):
    """Results by query: `out` [B, T, H, D], `n_keys` [B, T], `coverage` [B, T] or None where not asked for."""

    out: Any
    n_keys: Any
    coverage: Any


def attend_natively(
    q: Float[Array, "B T H D"],
    select: Branch,
    branches: NSABranches,
    *,
    geometry: BlockGeometry,
    window: int,
    wants_coverage: bool,
    softmax_scale: float,
    visible: Visible,
    implementations: Implementations,
) -> AttentionOutput:
    """sum over branches of gate * attention(q, k, v of the branch).

    Compression: all compressed keys that lie in the visible range as a whole. Selection: the keys of the `geometry.topk` blocks
    that `block_topk` chooses for each key group. Window: the last `window` visible keys. A branch without keys adds 0.

    On a mesh as `attention.attend`, with compressed keys in full on every device of `context`.

    Args:
        q: queries, the same for all branches.
        select: the layer's own keys and values.
        wants_coverage: whether to measure the dense attention mass of the selection.

    Returns:
        `keys_per_query`: keys read, those of the three branches added up, mean over key groups. `coverage`: of the selection
        branch alone, the share of dense attention over its keys that the selected ones hold. No `topk_indices`.
    """

    def core(q: Array, select: Branch, compress: Branch, window_branch: Branch, gates: Array, visible: Visible) -> _PerQuery:
        select, window_branch = (Branch(*map(gather_keys, branch)) for branch in (select, window_branch))
        start, end = visible.start, visible.end
        attend = functools.partial(dense_attention, softmax_scale=softmax_scale, implementation=implementations.dense_attention)
        n_keys = select.k.shape[1]
        compressed = geometry.compressed_range(visible)
        coarse = attend(q, *compress, compressed)
        blocks = block_topk(
            q,
            compress.k,
            coarse.lse,
            visible,
            softmax_scale=softmax_scale,
            n_keys=n_keys,
            geometry=geometry,
            implementation=implementations.block_topk,
        )
        blocks = checkpoint_name(blocks, TOPK_NAME)
        settings = {"softmax_scale": softmax_scale, "implementation": implementations.sparse_attention}
        fine, fine_lse, n_fine = _attend_to_blocks(q, select, blocks, geometry, visible, settings)
        near = jnp.maximum(start, end - window)
        local = attend(q, *window_branch, Visible(near, end))
        outs = jnp.stack([coarse.out, fine, local.out], axis=-2).astype(gates.dtype)
        out = jnp.sum(gates[..., None] * outs, axis=-2).astype(q.dtype)
        coverage = None
        if wants_coverage:
            yardstick = jax.lax.stop_gradient((q, *select))
            everything = attend(*yardstick, visible)
            coverage = mean_over("tensor", attention_mass(fine_lse, everything.lse))
        return _PerQuery(out, mean_over("tensor", n_fine) + (compressed.end - compressed.start) + (end - near), coverage)

    # Compressed keys are few; their number divides by nothing.
    few = PartitionSpec(BATCH_AXES, None, *key_spec(branches.compress.k)[2:])
    specs = [HEADS, key_spec(select.k), few, key_spec(branches.window.k), HEADS, ROWS]
    results = _PerQuery(HEADS, ROWS, ROWS if wants_coverage else None)
    spread = per_device(core, in_specs=tuple(specs), out_specs=results)
    out, n_keys, coverage = spread(q, select, branches.compress, branches.window, branches.gates, visible)
    return AttentionOutput(
        out=out,
        topk_indices=None,
        indexer_kl=None,
        coverage=None if coverage is None else mean_over_valid(coverage, visible.some),
        keys_per_query=mean_over_valid(n_keys, visible.some),
    )


def _attend_to_blocks(
    q: Float[Array, "B T H D"],
    select: Branch,
    blocks: Int32[Array, "B T G K"],
    geometry: BlockGeometry,
    visible: Visible,
    settings: dict[str, Any],
) -> tuple[Float[Array, "B T H D"], Float[Array, "B T H"], Float[Array, "B T"]]:
    """(out, lse, keys read): every key group becomes a row of its own, since each has its own selection."""
    (batch, length, heads, dim), groups = q.shape, select.k.shape[2]
    keys = blocks[..., None] * geometry.select_block + jnp.arange(geometry.select_block, dtype=jnp.int32)
    start, end = (bound[:, :, None, None, None] for bound in (visible.start, visible.end))
    keys = jnp.where((blocks[..., None] >= 0) & (keys >= start) & (keys < end), keys, -1)
    indices = keys.reshape(batch, length, groups, geometry.topk * geometry.select_block)
    by_group = lambda x: jnp.moveaxis(x, 2, 1).reshape(batch * groups, x.shape[1], *x.shape[3:])
    out, lse = sparse_attention(
        by_group(q.reshape(batch, length, groups, heads // groups, dim)),
        by_group(select.k)[:, :, None],
        by_group(select.v)[:, :, None],
        by_group(indices),
        **settings,
    )
    back = lambda x: jnp.moveaxis(x.reshape(batch, groups, length, *x.shape[2:]), 1, 2).reshape(
        batch, length, heads, *x.shape[3:]
    )
    return back(out), back(lse), jnp.mean(jnp.sum(indices >= 0, axis=-1), axis=-1, dtype=jnp.float32)
