"""Native sparse attention's own weights: keys and values of its branches, the network that compresses them, and the gates.

Source: arXiv 2502.11089, sections 3 and 4.1. Grouped-query attention only. The selection branch reads the layer's own keys and
values, so that a layer can also attend densely; compression and window have projections of their own.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from dsa_jax.model.linear import Linear
from dsa_jax.model.norm import RMSNorm
from dsa_jax.model.rope import Rope, rotary_magnitude, rotate
from dsa_jax.parallel.sequence import from_balanced
from pallas_kernels import BlockGeometry

BRANCHES = ("compress", "select", "window")
"""In the order of the gates."""
GATE_START = -math.log(2.0)
"""What makes a gate without learned weights 1/3: three branches then add up to their mean."""


class Branch(NamedTuple):
    """Keys and values of one branch; the compressed ones have one entry per block."""

    k: Float[Array, "B S G D"]
    v: Float[Array, "B S G D"]


class NSABranches(NamedTuple):
    """What `NSA` adds to the heads of its layer; `gates` in (0, 1), in the order of `BRANCHES`."""

    compress: Branch
    window: Branch
    gates: Float[Array, "B T H 3"]


class NSA(nn.Module):
    """Keys and values of the compression and window branches, and a sigmoid gate per head and branch from the hidden state.

    A compressed key stands at the position of its block's middle token, the one before the middle in a block of even length;
    it is compressed before and rotated after, which the paper leaves open.
    """

    hidden_dim: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    geometry: BlockGeometry
    window: int
    rope: Rope
    qk_norm: bool
    qk_norm_eps: float
    use_bias: bool
    init_std: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    def setup(self) -> None:
        """Create the projections, compressors and gates."""
        kind: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        shape = self.hidden_dim, self.n_kv_heads * self.head_dim, self.init_std
        self.compress_wk, self.compress_wv = (Linear(*shape, use_bias=self.use_bias, **kind) for _ in range(2))
        self.window_wk, self.window_wv = (Linear(*shape, use_bias=self.use_bias, **kind) for _ in range(2))
        if self.qk_norm:
            self.compress_k_norm, self.window_k_norm = (RMSNorm(self.head_dim, self.qk_norm_eps, self.dtype) for _ in range(2))
        sizes = self.geometry.compress_block, self.geometry.compress_stride, self.head_dim, self.init_std
        self.compress_k, self.compress_v = (Compressor(*sizes, **kind) for _ in range(2))
        self.gate = Linear(self.hidden_dim, self.n_heads * len(BRANCHES), 0.0, use_bias=True, **kind)

    def __call__(self, x: Float[Array, "B T E"], positions: Int[Array, "B T"]) -> NSABranches:
        """The branches of the normed hidden state `x`; compressed keys are in natural order whatever order `x` is in."""
        heads = lambda y: y.reshape(*x.shape[:2], self.n_kv_heads, self.head_dim)
        compress_k, window_k = heads(self.compress_wk(x)), heads(self.window_wk(x))
        if self.qk_norm:
            compress_k, window_k = self.compress_k_norm(compress_k), self.window_k_norm(window_k)
        turn = lambda k, positions: rotate(k, positions, self.rope, magnitude=rotary_magnitude(self.rope))
        k = self.compress_k(from_balanced(compress_k))
        first = (self.geometry.compress_block - 1) // 2
        middle = from_balanced(positions)[:, first :: self.geometry.compress_stride][:, : k.shape[1]]
        v = self.compress_v(from_balanced(heads(self.compress_wv(x))))
        gates = jax.nn.sigmoid(self.gate(x).astype(jnp.float32) + GATE_START)
        return NSABranches(
            compress=Branch(turn(k, middle), v),
            window=Branch(turn(window_k, positions), heads(self.window_wv(x))),
            gates=gates.reshape(*x.shape[:2], self.n_heads, len(BRANCHES)),
        )


class Compressor(nn.Module):
    """One vector per block of tokens: their mean plus a small network of them and of their place in the block.

    mean(x_j) + w_out silu(w_in [x_j + position_j]_j), the same for every head. The network's output starts at zero, so an
    untrained compressor is the mean.
    """

    block: int
    stride: int
    dim: int
    init_std: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    def setup(self) -> None:
        """Create the position embedding and the two layers."""
        kind: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.position = self.param("position", nn.initializers.normal(self.init_std), (self.block, self.dim), self.param_dtype)
        self.w_in = Linear(self.block * self.dim, self.dim, self.init_std, **kind)
        self.w_out = Linear(self.dim, self.dim, 0.0, **kind)

    def __call__(self, x: Float[Array, "B S G D"]) -> Float[Array, "B N G D"]:
        """The blocks that lie within the S tokens as a whole; none when there are fewer tokens than a block has."""
        batch, length, groups = x.shape[:3]
        n_blocks, steps = max(0, (length - self.block) // self.stride + 1), self.block // self.stride
        used = (n_blocks + steps - 1) * self.stride
        padded = jnp.pad(x[:, :used], ((0, 0), (0, max(0, used - length)), (0, 0), (0, 0)))
        strides = padded.reshape(batch, n_blocks + steps - 1, self.stride, groups, self.dim)
        blocks = jnp.concatenate([strides[:, n : n + n_blocks] for n in range(steps)], axis=2)
        blocks = jnp.moveaxis(blocks, 2, 3)  # [B, N, G, block, D]
        flat = (blocks + self.position.astype(self.dtype)).reshape(*blocks.shape[:3], self.block * self.dim)
        return blocks.mean(3) + self.w_out(jax.nn.silu(self.w_in(flat)))
