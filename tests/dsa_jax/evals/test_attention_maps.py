"""The maps are what the model computes with: the same selections, the same KL."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.config import ModelConfig
from dsa_jax.evals.attention_maps import attention_maps
from dsa_jax.model import build_model, init_params


def tiny(kind, layer_types=()):
    config = ModelConfig(vocab_size=32, hidden_dim=32, n_layers=2, mlp_dim=32)
    config.initializer_range = 0.2
    shape, indexer = config.attention, config.attention.indexer
    shape.kind, shape.n_heads, shape.n_kv_heads, shape.head_dim = kind, 4, 2, 16
    shape.kv_lora_rank, shape.qk_nope_head_dim, shape.qk_rope_head_dim, shape.v_head_dim = 16, 16, 8, 16
    indexer.enabled, indexer.n_heads, indexer.head_dim, indexer.rope_dim, indexer.topk = True, 2, 16, 8, 5
    config.attention.layer_types = layer_types
    return build_model(config)


@pytest.mark.parametrize("kind", ["gqa", "mla"])
def test_maps_give_the_models_kl_and_selection(kind):
    model = tiny(kind)
    params = init_params(model, jax.random.key(0))
    input_ids = jax.random.randint(jax.random.key(1), (2, 12), 0, 32)

    @jax.jit
    def everything(params):
        run = lambda **request: model.apply({"params": params}, input_ids, **request)
        dense, sparse = run(attention="dense", indexer_loss="dense"), run(attention="sparse", return_topk_indices=True)
        return attention_maps(model, params, input_ids), dense, sparse

    maps, dense, sparse = everything(params)
    visible = np.tril(np.ones((12, 12), bool))
    for layer, (attention, scores) in enumerate(maps):
        assert (np.isneginf(scores) == ~visible).all() and (np.asarray(attention)[:, ~visible] == 0).all()
        np.testing.assert_allclose(attention.sum(-1), 1, rtol=1e-5)
        scores, attention = np.where(visible, scores, -1e30), np.where(visible, attention, 1.0)
        log_q = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        kl = np.where(visible, attention * (np.log(attention) - log_q), 0).sum(-1).mean()
        np.testing.assert_allclose(kl, dense.indexer_kl[layer], rtol=1e-4)
    # Hidden states are those of dense attention, so only the first layer's selection is comparable.
    order = np.argsort(-np.asarray(maps[0].scores), axis=-1, kind="stable")
    for b, t in np.ndindex(2, 12):
        kept = sorted(order[b, t, : min(5, t + 1)])
        assert kept == [i for i in np.asarray(sparse.topk_indices)[0, b, t] if i >= 0]


def test_a_layer_that_shares_has_no_scores():
    model = tiny("gqa", ("full", "shared"))
    params = init_params(model, jax.random.key(0))
    first, second = jax.jit(lambda params: attention_maps(model, params, jnp.zeros((1, 4), jnp.int32)))(params)
    assert first.scores is not None and second.scores is None
    # All tokens are equal: every visible key gets the same attention but for its place.
    np.testing.assert_allclose(second.attention.sum(-1), 1, rtol=1e-5)
