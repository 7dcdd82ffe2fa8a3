"""A topk beyond the number of keys: the bits of topk = S, padded with -1, and no array but the result has its slots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops_helpers import IMPLEMENTATIONS, arrays_with, normal, ranges

import pallas_kernels as pk
from pallas_kernels import BlockGeometry, ForcedKeys, IndexHeads

BATCH, QUERIES, KEYS, TOPK = 2, 7, 9, 16384
VISIBLE = ranges("random", BATCH, QUERIES, KEYS)
RNG = np.random.default_rng(0)
INDEX = IndexHeads(normal(RNG, BATCH, QUERIES, 2, 4), normal(RNG, BATCH, KEYS, 4), normal(RNG, BATCH, QUERIES, 2))
Q, K = normal(RNG, BATCH, QUERIES, 2, 4), normal(RNG, BATCH, KEYS, 1, 4)
LSE = pk.dense_attention(Q, K, None, VISIBLE, softmax_scale=0.5).lse

SELECTIONS = {
    "index_topk": lambda topk, name: pk.index_topk(INDEX, VISIBLE, topk=topk, implementation=name),
    "forced": lambda topk, name: pk.index_topk(INDEX, VISIBLE, topk=topk, forced=ForcedKeys(2, 1), implementation=name),
    "coarse_to_fine": lambda topk, name: pk.index_topk_coarse_to_fine(
        INDEX, VISIBLE, topk=topk, block_size=2, n_blocks=1, implementation=name
    ),
    "attention_topk": lambda topk, name: pk.attention_topk(
        Q, K, LSE, VISIBLE, softmax_scale=0.5, topk=topk, implementation=name
    ),
}


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "pallas"])
@pytest.mark.parametrize("name", SELECTIONS)
def test_selections_are_those_of_all_keys_padded(name, implementation):
    if name == "attention_topk" and implementation == "pallas":
        pytest.skip("the op has no such implementation")
    select = SELECTIONS[name]
    least, most = select(KEYS, implementation), select(TOPK, implementation)
    assert most.shape == (BATCH, QUERIES, TOPK)
    np.testing.assert_array_equal(most[..., :KEYS], least)
    assert (np.asarray(most[..., KEYS:]) == -1).all()
    made = arrays_with(jax.make_jaxpr(lambda: select(TOPK, implementation))().jaxpr, TOPK)
    assert set(made) <= {"pad"}, made


def test_forced_keys_beyond_the_keys_are_all_of_them():
    first = pk.index_topk(INDEX, VISIBLE, topk=200, forced=ForcedKeys(120, 50))
    np.testing.assert_array_equal(first, pk.index_topk(INDEX, VISIBLE, topk=200))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_blocks_beyond_those_there_are(implementation):
    def select(topk):
        geometry = BlockGeometry(compress_block=2, compress_stride=2, select_block=4, topk=topk, n_initial=1, n_local=1)
        k = K[:, : geometry.n_compressed(KEYS)]
        options = {"softmax_scale": 0.5, "n_keys": KEYS, "geometry": geometry, "implementation": implementation}
        return pk.block_topk(Q, k, LSE, VISIBLE, **options)

    most = select(1000)
    np.testing.assert_array_equal(most[..., :3], select(3))
    assert most.shape[-1] == 1000 and (np.asarray(most[..., 3:]) == -1).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_of_a_selection_changes_no_bit_of_attention_and_loss(implementation):
    indices = pk.index_topk(INDEX, VISIBLE, topk=KEYS)
    padded = jnp.pad(indices, ((0, 0), (0, 0), (0, 50)), constant_values=-1)

    def results(indices):
        def total(q, k, index):
            out, lse = pk.sparse_attention(q, k, None, indices, softmax_scale=0.5, implementation=implementation)
            options = {"softmax_scale": 0.5, "topk_indices": indices, "implementation": implementation}
            kl = pk.indexer_kl(index, VISIBLE, q, k, lse, **options)
            return (out**2).sum() + kl.sum(), (out, lse, kl)

        return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(Q, K, INDEX)

    jax.tree.map(np.testing.assert_array_equal, results(padded), results(indices))


def test_keys_that_stand_behind_the_padding_count():
    """Any order and a key twice: nothing may be cut off where it holds a key."""
    few = jnp.asarray([[[3, 1, 1]]], jnp.int32)
    scattered = jnp.full((1, 1, 40), -1, jnp.int32).at[0, 0, jnp.asarray([2, 30, 39])].set(few[0, 0])
    q, k = Q[:1, :1], K[:1]
    wanted = pk.sparse_attention(q, k, None, few, softmax_scale=0.5)
    for implementation in IMPLEMENTATIONS:
        got = pk.sparse_attention(q, k, None, scattered, softmax_scale=0.5, implementation=implementation)
        np.testing.assert_allclose(got.out, wanted.out, rtol=1e-6)
        np.testing.assert_allclose(got.lse, wanted.lse, rtol=1e-6)
