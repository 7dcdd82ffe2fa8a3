"""The lightning indexer: a small network whose scores choose the keys that attention reads."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from dsa_jax.config.model import PLAIN
from dsa_jax.model.kernels import widened
from dsa_jax.model.linear import Linear
from dsa_jax.model.norm import LayerNorm
from dsa_jax.model.rope import Rope, rotate
from pallas_kernels import IndexHeads
from pallas_kernels.quantize import hadamard_transform, simulate_fp8


class Indexer(nn.Module):
    """Index queries (many heads), one index key per token, and signed head weights.

    q = rope(wq_b q_input), k = rope(LayerNorm(wk x)), weights = (weights_proj x) * n_heads**-0.5 * head_dim**-0.5. The rotated
    channels come first in each head, opposite to MLA. Rotation has unit magnitude: YaRN's temperature never enters the indexer.

    `head_weights` "constant" replaces weights_proj x by 1 and has no
    such parameter. `detach_input` False lets the gradient of the KL through to what the indexer reads.

    Source: DeepSeek-V3.2 report, section 1; DeepSeek-V3.2-Exp inference/model.py, class Indexer (with half-split rotation).
    """

    hidden_dim: int
    q_input_dim: int
    n_heads: int
    head_dim: int
    rope: Rope
    norm_eps: float
    hadamard: bool
    fp8: bool
    head_weights: str
    detach_input: bool
    init_std: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    weight_format: str = PLAIN

    def setup(self) -> None:
        """Create the projections and the key norm."""
        kind: dict[str, Any] = {"init_std": self.init_std, "dtype": self.dtype, "param_dtype": self.param_dtype}
        self.wq_b = Linear(self.q_input_dim, self.n_heads * self.head_dim, weight_format=self.weight_format, **kind)
        self.wk = Linear(self.hidden_dim, self.head_dim, weight_format=self.weight_format, **kind)
        self.k_norm = LayerNorm(self.head_dim, self.norm_eps, self.dtype)
        # Never in fp8, as published: they weigh the heads, and are small.
        if self.head_weights == "learned":
            self.weights_proj = Linear(self.hidden_dim, self.n_heads, **kind)

    def __call__(self, x: Float[Array, "B T E"], q_input: Float[Array, "B T Q"], positions: Int[Array, "B T"]) -> IndexHeads:
        """Index heads of every token.

        Args:
            x: hidden state after the attention input norm.
            q_input: the normed query latent of MLA, or `x` where there is none.
        """
        # The indexer learns from its KL alone and the model from its own loss alone: the two part here.
        if self.detach_input:
            x, q_input = jax.lax.stop_gradient((x, q_input))
        q = self.wq_b(q_input).reshape(*x.shape[:2], self.n_heads, self.head_dim)
        k = self.k_norm(self.wk(x))[:, :, None, :]
        q, k = self._position(q, positions), self._position(k, positions)
        if self.hadamard:
            q, k = hadamard_transform(q), hadamard_transform(k)
        if self.fp8:
            q, k = simulate_fp8(q), simulate_fp8(k)
        weights = self._head_weights(x)
        return IndexHeads(q, k[:, :, 0, :], weights * (self.n_heads * self.head_dim) ** -0.5)

    @nn.nowrap
    def no_heads(self, batch: int, length: int) -> IndexHeads:
        """Zeros of the shapes and types of a result; needs no parameters."""
        return IndexHeads(
            jnp.zeros((batch, length, self.n_heads, self.head_dim), self.dtype),
            jnp.zeros((batch, length, self.head_dim), self.dtype),
            jnp.zeros((batch, length, self.n_heads), jnp.float32),
        )

    def _head_weights(self, x: Float[Array, "B T E"]) -> Float[Array, "B T H"]:
        if self.head_weights == "constant":
            return jnp.ones((*x.shape[:2], self.n_heads), jnp.float32)
        kernel = widened(self.weights_proj.kernel, jnp.float32)
        return jnp.matmul(x.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)

    def _position(self, x: Float[Array, "B T H D"], positions: Int[Array, "B T"]) -> Float[Array, "B T H D"]:
        if self.rope.dim == 0:
            return x
        turned = rotate(x[..., : self.rope.dim], positions, self.rope)
        return jnp.concatenate([turned, x[..., self.rope.dim :]], axis=-1)
