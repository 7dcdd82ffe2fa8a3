"""Native sparse attention: grouped-query attention over compressed blocks, selected blocks and a window, added with gates.

The selection branch reads the layer's own keys and values, so that a layer can also attend densely or to a selection, as a
grouped-query layer does; compression and window have projections of their own.

Source: arXiv 2502.11089, sections 3 and 4.1.
"""

import functools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Int32

from dsa_jax.config import AttentionConfig, ModelConfig, NSAConfig
from dsa_jax.config import attention as kinds
from dsa_jax.config.model import PLAIN
from dsa_jax.config.selections import selection
from dsa_jax.costs.kinds import gqa_costs
from dsa_jax.model.attention import gqa
from dsa_jax.model.attention.attend import TOPK_NAME, Attention, attention_mass
from dsa_jax.model.attention.base import AttentionKind, AttentionOutput, Parameter
from dsa_jax.model.attention.selection import implementations_of
from dsa_jax.model.attention.visibility import mean_over_valid
from dsa_jax.model.linear import linear
from dsa_jax.model.norm import RMSNorm
from dsa_jax.model.outputs import AttentionRequest, LayerContext
from dsa_jax.model.rope import rotary_magnitude, rotate
from dsa_jax.parallel.ambient import ROWS, mean_over, per_device
from dsa_jax.parallel.mesh import BATCH_AXES
from dsa_jax.parallel.sequence import HEADS, from_balanced, gather_keys, key_spec
from pallas_kernels import BlockGeometry, Visible, block_topk, dense_attention, sparse_attention

MODE = "nsa"
BRANCHES = ("compress", "select", "window")
"""In the order of the gates."""
GATE_START = -math.log(2.0)
"""Logit of a gate without learned weights, 1/3: three branches then add up to their mean."""
_COLUMNS = ("fsdp", "tensor")


def _parameters() -> tuple[Parameter, ...]:
    own = [("nsa/gate/kernel", _COLUMNS), ("nsa/gate/bias", ())]
    for branch in ("compress", "window"):
        for name in ("wk", "wv"):
            own += [(f"nsa/{branch}_{name}/kernel", _COLUMNS), (f"nsa/{branch}_{name}/bias", ("tensor",))]
        own.append((f"nsa/{branch}_k_norm/scale", ()))
    for name in ("k", "v"):
        own += [(f"nsa/compress_{name}/{leaf}", ()) for leaf in ("position", "w_in/kernel", "w_out/kernel")]
    return gqa.PARAMETERS + tuple(Parameter(path, split, learns=MODE) for path, split in own)


class Branch(NamedTuple):
    """Keys and values of one branch; the compressed ones have one entry per block."""

    k: Float[Array, "B S G D"]
    v: Float[Array, "B S G D"]


class NSABranches(NamedTuple):
    """The branches that native sparse attention adds to its layer; `gates` in (0, 1), in the order of `BRANCHES`."""

    compress: Branch
    window: Branch
    gates: Float[Array, "B T H 3"]


class NSA(gqa.GQA):
    """A grouped-query layer with the branches of native sparse attention, which only the mode "nsa" reads."""

    def setup(self) -> None:
        """Create the projections of the layer and of the branches."""
        super().setup()
        self.nsa = Branches(self.config)

    def __call__(self, x: Float[Array, "B T E"], context: LayerContext, request: AttentionRequest) -> AttentionOutput:
        """Attend; `x` is normed."""
        if request.attention != MODE:
            return super().__call__(x, context, request)
        heads = self.heads(x, context.positions)
        assert heads.v is not None
        branches = self.nsa(x, context.positions)
        result = attend_natively(self.call(request), heads.q, Branch(heads.k, heads.v), branches, context.visible)
        return result._replace(out=self.project_out(result.out))

    def touch(self, x: Float[Array, "B T E"], positions: Int[Array, "B T"]) -> None:
        """Use every parameter."""
        super().touch(x, positions)
        self.nsa(x, positions)


class Branches(nn.Module):
    """Keys and values of the compression and window branches, and a sigmoid gate per head and branch from the hidden state.

    A compressed key stands at the position of its block's middle token, the one before the middle in a block of even length;
    it is compressed before and rotated after, which the paper leaves open.
    """

    config: ModelConfig

    def setup(self) -> None:
        """Create the projections, compressors and gates."""
        config, attention = self.config, self.config.attention

        def project() -> nn.Module:
            kv_dim = attention.n_kv_heads * attention.head_dim
            return linear(config, config.hidden_dim, kv_dim, use_bias=attention.use_bias, weight_format=PLAIN)

        self.compress_wk, self.compress_wv, self.window_wk, self.window_wv = (project() for _ in range(4))
        if attention.qk_norm:
            norm = lambda: RMSNorm(attention.head_dim, config.norm_eps, jnp.dtype(config.dtype))
            self.compress_k_norm, self.window_k_norm = norm(), norm()
        self.compress_k, self.compress_v = Compressor(config), Compressor(config)
        n_gates = attention.n_heads * len(BRANCHES)
        self.gate = linear(config, config.hidden_dim, n_gates, init_std=0.0, use_bias=True, weight_format=PLAIN)

    def __call__(self, x: Float[Array, "B T E"], positions: Int[Array, "B T"]) -> NSABranches:
        """The branches of the normed hidden state `x`; compressed keys are in natural order whatever order `x` is in."""
        attention, rope = self.config.attention, gqa.rope_of(self.config.attention)
        heads = lambda y: y.reshape(*x.shape[:2], attention.n_kv_heads, attention.head_dim)
        compress_k, window_k = heads(self.compress_wk(x)), heads(self.window_wk(x))
        if attention.qk_norm:
            compress_k, window_k = self.compress_k_norm(compress_k), self.window_k_norm(window_k)
        turn = lambda k, positions: rotate(k, positions, rope, magnitude=rotary_magnitude(rope))
        k = self.compress_k(from_balanced(compress_k))
        first = (attention.nsa.compress_block - 1) // 2
        middle = from_balanced(positions)[:, first :: attention.nsa.compress_stride][:, : k.shape[1]]
        v = self.compress_v(from_balanced(heads(self.compress_wv(x))))
        gates = jax.nn.sigmoid(self.gate(x).astype(jnp.float32) + GATE_START)
        return NSABranches(
            compress=Branch(turn(k, middle), v),
            window=Branch(turn(window_k, positions), heads(self.window_wv(x))),
            gates=gates.reshape(*x.shape[:2], attention.n_heads, len(BRANCHES)),
        )


class Compressor(nn.Module):
    """One vector per block of tokens: their mean plus a small network of them and of their place in the block.

    mean(x_j) + w_out silu(w_in [x_j + position_j]_j), the same for every head. The network's output starts at zero, so an
    untrained compressor is the mean.
    """

    config: ModelConfig

    def setup(self) -> None:
        """Create the position embedding and the two layers."""
        config, block, dim = self.config, self.config.attention.nsa.compress_block, self.config.attention.head_dim
        init = nn.initializers.normal(config.initializer_range)
        self.position = self.param("position", init, (block, dim), jnp.dtype(config.param_dtype))
        self.w_in = linear(config, block * dim, dim, weight_format=PLAIN)
        self.w_out = linear(config, dim, dim, init_std=0.0, weight_format=PLAIN)

    def __call__(self, x: Float[Array, "B S G D"]) -> Float[Array, "B N G D"]:
        """The blocks that lie within the S tokens as a whole; none when there are fewer tokens than a block has."""
        batch, length, groups, dim = x.shape
        nsa = self.config.attention.nsa
        block, stride = nsa.compress_block, nsa.compress_stride
        n_blocks, steps = max(0, (length - block) // stride + 1), block // stride
        used = (n_blocks + steps - 1) * stride
        padded = jnp.pad(x[:, :used], ((0, 0), (0, max(0, used - length)), (0, 0), (0, 0)))
        strides = padded.reshape(batch, n_blocks + steps - 1, stride, groups, dim)
        blocks = jnp.concatenate([strides[:, n : n + n_blocks] for n in range(steps)], axis=2)
        blocks = jnp.moveaxis(blocks, 2, 3)  # [B, N, G, block, D]
        flat = (blocks + self.position.astype(self.config.dtype)).reshape(*blocks.shape[:3], block * dim)
        return blocks.mean(3) + self.w_out(jax.nn.silu(self.w_in(flat)))


class _PerQuery(NamedTuple):
    """Results by query: `out` [B, T, H, D], `n_keys` [B, T], `coverage` [B, T] or None where not asked for."""

    out: Any
    n_keys: Any
    coverage: Any


def attend_natively(
    call: Attention, q: Float[Array, "B T H D"], select: Branch, branches: NSABranches, visible: Visible
) -> AttentionOutput:
    """sum over branches of gate * attention(q, k, v of the branch).

    Compression: all compressed keys that lie in the visible range as a whole. Selection: the keys of the `geometry.topk` blocks
    that `block_topk` chooses for each key group. Window: the last `window` visible keys. A branch without keys adds 0.

    On a mesh as `attention.attend`, with compressed keys in full on every device of `context`.

    Args:
        call: the config, the softmax scale and the request.
        q: queries, the same for all branches.
        select: the layer's own keys and values.
        branches: of the layer.
        visible: ranges of keys.

    Returns:
        `keys_per_query`: keys read, those of the three branches added up, mean over key groups. `coverage`: of the selection
        branch alone, the share of dense attention over its keys that the selected ones hold. No `topk_indices`.
    """
    config, softmax_scale, request = call
    geometry, implementations = block_geometry(config.nsa), implementations_of(config)

    def core(q: Array, select: Branch, compress: Branch, window_branch: Branch, gates: Array, visible: Visible) -> _PerQuery:
        select, window_branch = (Branch(*map(gather_keys, branch)) for branch in (select, window_branch))
        attend = functools.partial(dense_attention, softmax_scale=softmax_scale, implementation=implementations.dense_attention)
        whole = geometry.compressed_range(visible)
        coarse = attend(q, *compress, whole)
        blocks = block_topk(
            q,
            compress.k,
            coarse.lse,
            visible,
            n_keys=select.k.shape[1],
            geometry=geometry,
            softmax_scale=softmax_scale,
            implementation=implementations.block_topk,
        )
        blocks = checkpoint_name(blocks, TOPK_NAME)
        settings = {"softmax_scale": softmax_scale, "implementation": implementations.sparse_attention}
        fine, fine_lse, n_fine = _attend_to_blocks(q, select, blocks, geometry, visible, settings)
        near = Visible(jnp.maximum(visible.start, visible.end - config.nsa.window), visible.end)
        local = attend(q, *window_branch, near)
        outs = jnp.stack([coarse.out, fine, local.out], axis=-2).astype(gates.dtype)
        out = jnp.sum(gates[..., None] * outs, axis=-2).astype(q.dtype)
        coverage = None
        if request.coverage:
            everything = attend(*jax.lax.stop_gradient((q, *select)), visible)
            coverage = mean_over("tensor", attention_mass(fine_lse, everything.lse))
        return _PerQuery(out, mean_over("tensor", n_fine) + (whole.end - whole.start) + (near.end - near.start), coverage)

    # Compressed keys are few; their number divides by nothing.
    few = PartitionSpec(BATCH_AXES, None, *key_spec(branches.compress.k)[2:])
    specs = [HEADS, key_spec(select.k), few, key_spec(branches.window.k), HEADS, ROWS]
    results = _PerQuery(HEADS, ROWS, ROWS if request.coverage else None)
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
    # Ascending, so that what lies beyond the blocks there are is absent.
    blocks = blocks[..., : geometry.n_blocks(select.k.shape[1])]
    keys = blocks[..., None] * geometry.select_block + jnp.arange(geometry.select_block, dtype=jnp.int32)
    start, end = (bound[:, :, None, None, None] for bound in visible)
    keys = jnp.where((blocks[..., None] >= 0) & (keys >= start) & (keys < end), keys, -1)
    indices = keys.reshape(batch, length, groups, blocks.shape[-1] * geometry.select_block)
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


def block_geometry(nsa: NSAConfig) -> BlockGeometry:
    """Blocks of keys as the op takes them."""
    return BlockGeometry(
        compress_block=nsa.compress_block,
        compress_stride=nsa.compress_stride,
        select_block=nsa.select_block,
        topk=nsa.n_select_blocks,
        n_initial=nsa.n_initial_blocks,
        n_local=nsa.n_local_blocks,
    )


def _check_mode(request: AttentionRequest, *, return_topk_indices: bool, cached: bool) -> None:
    if request.indexer_loss:
        raise ValueError(
            f"indexer_loss is {request.indexer_loss!r} with attention 'nsa', which learns from the model's loss alone; "
            "expected None."
        )
    if return_topk_indices:
        raise NotImplementedError(
            "return_topk_indices is True with attention 'nsa', which selects blocks for each key-value group. Leave it False, "
            "or use another attention."
        )
    if cached:
        raise NotImplementedError(
            "attention 'nsa' cannot run over a cache: its compressed keys are not kept there. Evaluate whole rows, or name "
            "another attention, such as 'dense'."
        )


def _turned(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Branches as copies of the layer's own keys and values, so that each attends as the model has learned to.

    Compression starts as the mean of a block and every gate at 1/3, so the layer's output starts as the mean of three
    attentions with the magnitude of one.
    """
    turned = dict(leaves)
    for path in leaves:
        if match := re.fullmatch(r"(.*)/nsa/(?:compress|window)_(wk|wv|k_norm)/(.*)", path):
            turned[path] = jnp.copy(leaves["/".join(match.groups())])
    return turned


def _split_heads(attention: AttentionConfig) -> dict[str, int]:
    return {"n_heads": attention.n_heads, "n_kv_heads": attention.n_kv_heads}


NSA_KIND = AttentionKind(
    kinds.NSA,
    NSA,
    _parameters(),
    gqa.cache_entries,
    gqa_costs,
    _split_heads,
    modes=(selection(MODE),),
    check_mode=_check_mode,
    turned=_turned,
)
