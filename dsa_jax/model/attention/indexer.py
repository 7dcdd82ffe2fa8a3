"""The lightning indexer: a small network whose scores choose the keys that attention reads."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from dsa_jax.config import ModelConfig
from dsa_jax.config.model import PLAIN
from dsa_jax.model.attention.base import INDEXER, Parameter
from dsa_jax.model.kernels import widened
from dsa_jax.model.linear import linear
from dsa_jax.model.norm import LayerNorm
from dsa_jax.model.rope import Rope, rotate
from pallas_kernels import IndexHeads
from pallas_kernels.quantize import hadamard_transform, simulate_fp8

_TENSOR = "self_attn.indexer"
INDEXER_PARAMETERS = (
    Parameter("indexer/wq_b/kernel", ("fsdp", None), f"{_TENSOR}.wq_b.weight", INDEXER),
    Parameter("indexer/wk/kernel", ("fsdp", None), f"{_TENSOR}.wk.weight", INDEXER),
    Parameter("indexer/k_norm/scale", (), f"{_TENSOR}.k_norm.weight", INDEXER, is_float32=True),
    Parameter("indexer/k_norm/bias", (), f"{_TENSOR}.k_norm.bias", INDEXER, is_float32=True),
    Parameter("indexer/weights_proj/kernel", ("fsdp", None), f"{_TENSOR}.weights_proj.weight", INDEXER),
)


class Indexer(nn.Module):
    """Index queries (many heads), one index key per token, and signed head weights.

    q = rope(wq_b q_input), k = rope(LayerNorm(wk x)), weights = (weights_proj x) * n_heads**-0.5 * head_dim**-0.5. The rotated
    channels come first in each head, opposite to MLA. Rotation has unit magnitude: YaRN's temperature never enters the indexer.

    With `head_weights` "constant" weights_proj x is 1 and has no parameter.

    Source: DeepSeek-V3.2 report, section 1; DeepSeek-V3.2-Exp inference/model.py, class Indexer (with half-split rotation).
    """

    config: ModelConfig
    q_input_dim: int

    def setup(self) -> None:
        """Create the projections and the key norm."""
        config, indexer = self.config, self.config.attention.indexer
        self.wq_b = linear(config, self.q_input_dim, indexer.n_heads * indexer.head_dim)
        self.wk = linear(config, config.hidden_dim, indexer.head_dim)
        self.k_norm = LayerNorm(indexer.head_dim, indexer.norm_eps, jnp.dtype(config.dtype))
        # Never in fp8, as published: they weigh the heads, and are small.
        if indexer.head_weights == "learned":
            self.weights_proj = linear(config, config.hidden_dim, indexer.n_heads, weight_format=PLAIN)

    def __call__(self, x: Float[Array, "B T E"], q_input: Float[Array, "B T Q"], positions: Int[Array, "B T"]) -> IndexHeads:
        """Index heads of every token.

        Args:
            x: hidden state after the attention input norm.
            q_input: the normed query latent of MLA, or `x` where there is none.
            positions: for the rotary embedding.
        """
        indexer = self.config.attention.indexer
        # The indexer learns from its KL alone and the model from its own loss alone: the two part here.
        x, q_input = jax.lax.stop_gradient((x, q_input))
        q = self.wq_b(q_input).reshape(*x.shape[:2], indexer.n_heads, indexer.head_dim)
        k = self.k_norm(self.wk(x))[:, :, None, :]
        q, k = self._position(q, positions), self._position(k, positions)
        if indexer.hadamard:
            q, k = hadamard_transform(q), hadamard_transform(k)
        if indexer.fp8:
            q, k = simulate_fp8(q), simulate_fp8(k)
        return IndexHeads(q, k[:, :, 0, :], self._head_weights(x) * (indexer.n_heads * indexer.head_dim) ** -0.5)

    def _head_weights(self, x: Float[Array, "B T E"]) -> Float[Array, "B T H"]:
        indexer = self.config.attention.indexer
        if indexer.head_weights == "constant":
            return jnp.ones((*x.shape[:2], indexer.n_heads), jnp.float32)
        kernel = widened(self.weights_proj.kernel, jnp.float32)
        return jnp.matmul(x.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)

    def _position(self, x: Float[Array, "B T H D"], positions: Int[Array, "B T"]) -> Float[Array, "B T H D"]:
        attention = self.config.attention
        dim = attention.indexer.rope_dim
        if dim == 0:
            return x
        turned = rotate(x[..., :dim], positions, Rope(dim, attention.indexer.rope_layout, attention.rope))
        return jnp.concatenate([turned, x[..., dim:]], axis=-1)


def zero_index_heads(config: ModelConfig, batch: int, length: int) -> IndexHeads:
    """Zeros of the shapes and dtypes of an indexer's result."""
    indexer, dtype = config.attention.indexer, jnp.dtype(config.dtype)
    return IndexHeads(
        jnp.zeros((batch, length, indexer.n_heads, indexer.head_dim), dtype),
        jnp.zeros((batch, length, indexer.head_dim), dtype),
        jnp.zeros((batch, length, indexer.n_heads), jnp.float32),
    )
