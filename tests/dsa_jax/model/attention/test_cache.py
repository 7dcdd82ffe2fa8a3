"""Appending tokens to a cache must give what the full pass gives, however the tokens are cut up and wherever they lie."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.dsa_jax.model.small import LENGTH, VOCAB, built, forward, random_ids

CHUNK = 8
PROMPTS = np.array([17, 9])  # ragged on purpose
# Pages of 5 tokens that belong to nobody in order; row 0 owns five, row 1 five, and pages 2 and 7 stay unused.
BLOCK_TABLE = np.array([[11, 3, 0, 8, 5], [1, 10, 6, 4, 9]], np.int32)
LAYOUTS = {
    "contiguous": {"capacity": LENGTH + 3},
    "paged": {"capacity": LENGTH, "page_size": 5, "n_pages": 12, "block_table": BLOCK_TABLE},
}
MODELS = {
    "gqa": {"kind": "gqa_qwen"},
    "mla": {"kind": "mla"},
    "gqa-linear": {"kind": "gqa", "variant": (("activation", "none"), ("head_weights", "constant"))},
    "mla-forced": {"kind": "mla", "variant": (("forced_sink", 1), ("forced_local", 2))},
    "mla-moe-shared": {"kind": "mla_plain", "moe": True, "layer_types": ("full", "shared", "full")},
    "gqa-roles": {"kind": "gqa", "layer_types": ("window", "full", "dense", "shared")},
}


@functools.partial(jax.jit, static_argnums=0, static_argnames=("attention", "selections"), donate_argnames="cache")
def extend(model, params, input_ids, n_new, cache, *, attention, selections=False):
    return model.apply(
        {"params": params},
        input_ids,
        n_new,
        cache,
        attention=attention,
        return_all_logits=True,
        return_topk_indices=selections,
        method="extend",
    )


def feed(model, params, ids, cache, attention):
    """Feed ragged prompts in chunks, then the rest token by token: logits and selections of every position."""
    selections = attention != "dense"
    rows, length = ids.shape
    logits = np.full((rows, length, VOCAB), np.nan, np.float32)
    indices = None
    done = np.zeros(rows, int)
    while (done < length).any():
        # A row that has its prompt while another has not, or all of its tokens, gets padding.
        size = CHUNK if (done < PROMPTS).any() else 1
        limit = PROMPTS if size == CHUNK else length
        n_new = np.clip(limit - done, 0, size)
        chunk = np.full((rows, size), VOCAB - 1, np.int32)
        for row in range(rows):
            chunk[row, : n_new[row]] = ids[row, done[row] : done[row] + n_new[row]]
        result = extend(model, params, chunk, jnp.asarray(n_new, jnp.int32), cache, attention=attention, selections=selections)
        cache = result.cache
        if selections and indices is None:
            indices = np.full((*result.topk_indices.shape[:2], length, result.topk_indices.shape[3]), -9)
        for row in range(rows):
            new = slice(done[row], done[row] + n_new[row])
            logits[row, new] = result.all_logits[row, : n_new[row]]
            if n_new[row]:
                np.testing.assert_array_equal(result.logits[row], result.all_logits[row, n_new[row] - 1])
            if selections:
                indices[:, row, new] = result.topk_indices[:, row, : n_new[row]]
        done += n_new
        np.testing.assert_array_equal(cache.lengths, done)
    return logits, indices


@pytest.mark.parametrize(
    ("model_name", "attention"),
    [(name, attention) for name in ("gqa", "mla", "mla-moe-shared") for attention in ("dense", "sparse")]
    + [("mla-moe-shared", "window"), ("gqa-linear", "sparse"), ("mla-forced", "sparse"), ("mla-forced", "coarse_to_fine")]
    + [("gqa-roles", "sparse"), ("gqa-roles", "dense")],
)
def test_ragged_chunks_and_single_tokens_on_shuffled_pages_equal_the_full_pass(model_name, attention):
    model, params = built(**MODELS[model_name])
    ids = np.asarray(random_ids())
    cache = model.init_cache(2, dtype="float32", **LAYOUTS["paged"])
    logits, indices = feed(model, params, ids, cache, attention)
    full = forward(model, params, ids, attention=attention, everything=True)
    np.testing.assert_allclose(logits, full.logits, atol=1e-5, rtol=1e-5)
    if attention != "dense":
        np.testing.assert_array_equal(indices, full.topk_indices)


@pytest.mark.parametrize("attention", ["sparse", "oracle"])
def test_a_contiguous_cache_equals_the_full_pass(attention):
    model, params = built("mla")
    ids = np.asarray(random_ids())
    cache = model.init_cache(2, dtype="float32", **LAYOUTS["contiguous"])
    logits, indices = feed(model, params, ids, cache, attention)
    full = forward(model, params, ids, attention=attention, everything=True)
    np.testing.assert_allclose(logits, full.logits, atol=1e-5, rtol=1e-5)
    np.testing.assert_array_equal(indices, full.topk_indices)
