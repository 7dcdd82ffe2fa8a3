"""Where tokens lie, what rounding them costs one layer, and which caches are refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.model.attention.cache import CACHE_DTYPES, CacheEntry, LayerCache, token_slots
from dsa_jax.model.attention.visibility import causal_visibility
from dsa_jax.model.outputs import AttentionRequest, LayerContext
from tests.dsa_jax.model.small import built

# Relative error of one layer's attention output, by Frobenius norm, on equal inputs: e4m3 keeps three mantissa bits, so keys
# and values are off by at most 1/16 each and by 2.6 % in the root mean square. Measured: 0.025 to 0.031, and 0.002.
BOUND = {"fp8": 0.05, "bfloat16": 0.004}
# Mean share of the selected keys that the rounded index keys select too. Measured: 0.984 with fp8.
SHARED_SELECTION = 0.95


@functools.cache
def layer_output(kind, dtype, attention):
    """(attention output of one layer, its selection) for tokens that it reads back from a cache of `dtype`."""
    fields = {"kind": kind, "n_layers": 1, "mlp_dim": 8, "vocab_size": 512, "topk": 12}
    model, params = built(**fields)
    length = 64
    ids = jax.random.randint(jax.random.key(5), (4, length), 0, 512, dtype=jnp.int32)
    # The output projection alone reaches the residual stream, so that hidden minus embedding is the attention output.
    params = jax.tree.map(lambda leaf: leaf, params)  # dicts of its own
    params["dense_layers"]["mlp"]["down"]["kernel"] *= 0
    cache = model.init_cache(4, length, dtype=dtype, page_size=16)

    @jax.jit
    def run(params, ids, cache):
        def stream(module, ids, cache):
            positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), ids.shape)
            context = LayerContext(positions, causal_visibility(jnp.ones_like(ids)))
            x = module.embed(ids)
            y, _, indices = module._extend_layers(x, context, cache, AttentionRequest(attention))
            return y - x, indices

        return model.apply({"params": params}, ids, cache, method=stream)

    return jax.tree.map(np.asarray, run(params, ids, cache))


def shared(chosen, others):
    """Mean over queries of the share of `chosen` that is among `others`."""
    pairs = zip(chosen.reshape(-1, chosen.shape[-1]), others.reshape(-1, others.shape[-1]), strict=True)
    return np.mean([np.isin(one[one >= 0], other).mean() for one, other in pairs])


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("attention", ["dense", "sparse"])
@pytest.mark.parametrize("kind", ["gqa", "mla_plain"])
def test_a_rounded_cache_stays_within_its_bound(kind, attention, dtype):
    exact, chosen = layer_output(kind, "float32", attention)
    rounded, chosen_rounded = layer_output(kind, dtype, attention)
    assert np.isfinite(rounded).all() and (rounded != exact).any()
    if attention == "sparse":
        assert shared(chosen, chosen_rounded) >= SHARED_SELECTION
        # Other keys are another function, so outputs are compared where both chose the same ones.
        equal = (chosen == chosen_rounded).all(-1)[0]
        assert equal.mean() > 0.5
        exact, rounded = exact[equal], rounded[equal]
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert error <= BOUND[dtype], error


ENTRIES = {"latent": CacheEntry((150,), latent_dim=140), "keys": CacheEntry((2, 8))}
LENGTHS, NEW = np.array([3, 0]), np.array([2, 4])
# Six pages of two tokens. Row 1 owns only one page: its tokens 2 and 3 have no place and must be lost, not land elsewhere.
TABLE = np.array([[4, 0, 3], [2, -1, -1]], np.int32)


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize("paged", [True, False], ids=["paged", "contiguous"])
def test_tokens_lie_where_the_table_says(dtype, paged):
    table, page_size, n_slots = (jnp.asarray(TABLE), 2, 12) if paged else (None, 5, 10)
    positions = jnp.asarray(LENGTHS)[:, None] + jnp.arange(4)
    slots = token_slots(positions, jnp.arange(4) < NEW[:, None], table, page_size, n_slots=n_slots)
    # Token 3 of row 0 lies in its second page, 0, and token 4 in its third, 3; token 5 is padding.
    expected = [[1, 6, 12, 12], [4, 5, 12, 12]] if paged else [[3, 4, 10, 10], [5, 6, 7, 8]]
    assert slots.tolist() == expected

    rng = np.random.default_rng(0)
    rows = {name: jnp.asarray(rng.standard_normal((2, 4, *kind.shape)), jnp.float32) for name, kind in ENTRIES.items()}
    pools = {name: jnp.zeros((3, n_slots, *kind.storage(dtype)[0]), kind.storage(dtype)[1]) for name, kind in ENTRIES.items()}
    cache = LayerCache(pools, jnp.int32(1), ENTRIES, dtype, page_size, table, slots)
    for name, new in rows.items():
        cache = cache.write(name, new)
        kept = ENTRIES[name].decode(ENTRIES[name].encode(new, dtype), dtype, jnp.float32)
        written = {slot: kept[row, t] for row, line in enumerate(expected) for t, slot in enumerate(line) if slot < n_slots}
        for slot in range(n_slots):
            stored = ENTRIES[name].decode(cache.pools[name][1, slot], dtype, jnp.float32)
            np.testing.assert_array_equal(stored, written.get(slot, jnp.zeros(ENTRIES[name].shape)))
        assert not cache.pools[name][0].any() and not cache.pools[name][2].any()  # the other layers

        everything = cache.read(name, jnp.float32)
        assert everything.shape == (2, cache.capacity, *ENTRIES[name].shape)
        np.testing.assert_array_equal(everything[0, 3:5], kept[0, :2])
        np.testing.assert_array_equal(everything[1, : 2 if paged else 4], kept[1, : 2 if paged else 4])
        chosen = jnp.array([[[4, -1, 3]], [[-1, 1, 0]]])
        some = cache.gather(name, chosen, jnp.float32)
        np.testing.assert_array_equal(some[0, 0, ::2], everything[0, jnp.array([4, 3])])
        np.testing.assert_array_equal(some[1, 0, 1:], everything[1, jnp.array([1, 0])])
        assert np.isfinite(some).all()


def test_bytes_per_token_are_those_of_the_fp8_layouts():
    latent, index_key = CacheEntry((576,), latent_dim=512), CacheEntry((128,))
    assert latent.storage("fp8") == ((656,), jnp.uint8) and index_key.storage("fp8") == ((132,), jnp.uint8)
    assert CacheEntry((8, 128)).storage("fp8") == ((8, 132), jnp.uint8)
    model, _ = built("mla")  # 24 + 8 channels, index keys of 16, two layers
    per_token = {"float32": 4 * (32 + 16), "bfloat16": 2 * (32 + 16), "fp8": (24 + 4 + 16) + (16 + 4)}
    for dtype, expected in per_token.items():
        assert model.init_cache(3, 10, dtype=dtype).n_bytes == 2 * 3 * 10 * expected
    assert model.init_cache(1, 10, with_index_keys=False).n_bytes == 2 * 10 * 4 * 32


WRONG = {
    "dtype": ({"dtype": "int8"}, "cache dtype is 'int8'; expected one of float32, bfloat16, fp8"),
    "no-rows": ({"n_rows": 0}, "0 rows of 10 tokens"),
    "no-page": ({"page_size": 0}, "page_size is 0"),
    "few-pages": ({"page_size": 4, "n_pages": 5}, "5 pages of 4 tokens are too few for 2 rows of 10; expected 6"),
    "pages-without-size": ({"n_pages": 5}, "expected page_size"),
    "table": ({"page_size": 4, "block_table": np.zeros((2, 2), np.int32)}, r"shape \[2, 2\]; expected \[2, 3\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_caches_that_make_no_sense_are_refused(case):
    options, message = WRONG[case]
    arguments = {"n_rows": 2, "capacity": 10} | options
    with pytest.raises(ValueError, match=message):
        built("mla")[0].init_cache(**arguments)


def test_sparse_attention_needs_index_keys():
    model, params = built("mla")
    cache = model.init_cache(1, 8, with_index_keys=False)
    ids, n_new = np.ones((1, 1), np.int32), np.ones(1, np.int32)
    with pytest.raises(ValueError, match=r"cache holds no index keys.*with_index_keys=True"):
        model.apply({"params": params}, ids, n_new, cache, attention="sparse", method="extend")
