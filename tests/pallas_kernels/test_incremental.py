"""Decoding and chunked prefill are the same ops with other ranges: their rows must be those of the full pass."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import IndexHeads, Visible, dense_attention, index_topk, sparse_attention

LENGTH, TOPK, SCALE = 37, 5, 0.3


def arrays():
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    end = jnp.arange(1, LENGTH + 1, dtype=jnp.int32)[None].repeat(2, 0)
    return {
        "q_index": normal(2, LENGTH, 3, 8),
        "k_index": normal(2, LENGTH, 8),
        "weights": normal(2, LENGTH, 3),
        "q": normal(2, LENGTH, 4, 12),
        "k": normal(2, LENGTH, 2, 12),
        "v": normal(2, LENGTH, 2, 6),
        "start": jnp.zeros_like(end),
        "end": end,
    }


def layer(a, rows, n_keys, implementation):
    """Queries `rows` of the layer against the first `n_keys` keys."""
    cut = {name: x[:, rows] for name, x in a.items() if name in ("q_index", "weights", "q", "start", "end")}
    keys = {name: a[name][:, :n_keys] for name in ("k_index", "k", "v")}
    visible, index = Visible(cut["start"], cut["end"]), IndexHeads(cut["q_index"], keys["k_index"], cut["weights"])
    indices = index_topk(index, visible, topk=TOPK, implementation=implementation)
    sparse = sparse_attention(cut["q"], keys["k"], keys["v"], indices, softmax_scale=SCALE, implementation=implementation)
    dense = dense_attention(cut["q"], keys["k"], keys["v"], visible, softmax_scale=SCALE, implementation=implementation)
    return indices, *sparse, *dense


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("chunk", [1, 8], ids=["decode", "chunked-prefill"])
def test_pieces_equal_the_full_pass(implementation, chunk):
    a = arrays()
    full = layer(a, slice(None), LENGTH, implementation)
    for first in (0, 16, 36) if chunk == 1 else (0, 24, 32):
        rows = slice(first, min(first + chunk, LENGTH))
        piece = layer(a, rows, rows.stop, implementation)
        np.testing.assert_array_equal(piece[0], full[0][:, rows])
        for got, want in zip(piece[1:], full[1:], strict=True):
            np.testing.assert_allclose(got, want[:, rows], rtol=1e-5, atol=1e-6)
