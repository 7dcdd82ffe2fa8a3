"""XLA's temporaries grow linearly with the length: compiled only, nothing runs."""

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels as pk

# Twice the length may take 2.2 times the memory; anything of size T x S would take 4 times.
LENGTH, LIMIT = 8192, 2.2


def shapes(length):
    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    return {
        "q_index": array(1, length, 2, 16),
        "k_index": array(1, length, 16),
        "weights": array(1, length, 2),
        "q": array(1, length, 4, 32),
        "k": array(1, length, 1, 32),
        "lse": array(1, length, 4),
        "start": array(1, length, dtype=jnp.int32),
        "end": array(1, length, dtype=jnp.int32),
        "topk_indices": array(1, length, 64, dtype=jnp.int32),
    }


def index(x):
    return pk.IndexHeads(x["q_index"], x["k_index"], x["weights"])


def topk(x, visible):
    return pk.index_topk(index(x), visible, topk=64, implementation="xla")


def sparse(x, visible):
    def loss(q, k):
        return sum(y.sum() for y in pk.sparse_attention(q, k, None, x["topk_indices"], softmax_scale=1.0, implementation="xla"))

    return jax.grad(loss, (0, 1))(x["q"], x["k"])


def dense(x, visible):
    def loss(q, k):
        return sum(y.sum() for y in pk.dense_attention(q, k, None, visible, softmax_scale=1.0, implementation="xla"))

    return jax.grad(loss, (0, 1))(x["q"], x["k"])


def kl(x, visible, indices=None):
    def loss(index):
        target = x["q"], x["k"], x["lse"]
        return pk.indexer_kl(index, visible, *target, softmax_scale=1.0, topk_indices=indices, implementation="xla").sum()

    return jax.grad(loss)(index(x))


def kl_selected(x, visible):
    return kl(x, visible, x["topk_indices"])


def blocks(x, visible):
    geometry = pk.BlockGeometry(32, 16, 64, topk=16, n_initial=1, n_local=2)
    n_keys = x["k"].shape[1]
    settings = {"softmax_scale": 1.0, "n_keys": n_keys, "geometry": geometry, "implementation": "xla"}
    return pk.block_topk(x["q"], x["k"][:, : geometry.n_compressed(n_keys)], x["lse"], visible, **settings)


@pytest.mark.parametrize("run", [topk, sparse, dense, kl, kl_selected, blocks], ids=lambda f: f.__name__)
def test_temporaries_grow_linearly(run):
    def temporaries(length):
        def call(x):
            return run(x, pk.Visible(x["start"], x["end"]))

        return jax.jit(call).lower(shapes(length)).compile().memory_analysis().temp_size_in_bytes

    short, long = temporaries(LENGTH), temporaries(2 * LENGTH)
    assert long <= LIMIT * short, f"{short / 2**20:.1f} MiB at {LENGTH}, {long / 2**20:.1f} MiB at {2 * LENGTH}"
    # A single T x S matrix in float32 would be 256 MiB here.
    assert short < 128 * 2**20
