"""Layers of a model that do not all follow the mode: dense ones, windows, and sharing across them."""

import jax
import numpy as np
import pytest

from dsa_jax.config import ConfigError
from dsa_jax.model import build_model, layer_stacks
from dsa_jax.params import is_indexer_path, parameter_paths
from tests.dsa_jax.model.small import LENGTH, built, drawn, forward, random_ids, small_config

MIXED = ("window", "full", "dense", "shared")


def test_a_window_layer_sees_the_last_keys_and_a_dense_one_all():
    """One window layer equals the mode "window" of as many keys; a dense layer equals dense attention."""
    plain = build_model(small_config("none", n_layers=1, topk=6))
    params = drawn(plain)
    for role, mode in (("window", "window"), ("dense", "dense")):
        model = build_model(small_config("none", layer_types=(role,)))
        wanted = forward(plain, params, random_ids(), attention=mode, everything=True)
        got = forward(model, params, random_ids(), attention="dense", everything=True)
        np.testing.assert_allclose(got.logits, wanted.logits, atol=1e-5)
        np.testing.assert_allclose(got.keys_per_query, wanted.keys_per_query, rtol=1e-6)


def test_only_full_layers_have_indexers_and_a_sharing_layer_reuses_the_last_of_them():
    model, params = built("gqa", layer_types=MIXED)
    stacks = [stack.name for stack in layer_stacks(model.config)]
    assert stacks == ["dense_layers_0", "dense_layers_1", "dense_layers_2", "dense_layers_3"]
    assert {path.split("/")[0] for path in parameter_paths(params) if is_indexer_path(path)} == {"dense_layers_1"}
    out = forward(model, params, random_ids(), attention="sparse", indexer_loss="sparse", everything=True)
    np.testing.assert_array_equal(out.topk_indices[3], out.topk_indices[1])
    assert np.all(np.asarray(out.topk_indices)[[0, 2]] == -1)
    assert float(out.indexer_kl[1]) > 0 and not np.any(np.asarray(out.indexer_kl)[[0, 2, 3]])
    mean_seen = np.minimum(np.arange(LENGTH) + 1, 6).mean(), (LENGTH + 1) / 2
    np.testing.assert_allclose(np.asarray(out.keys_per_query)[[0, 2]], mean_seen, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(out.coverage)[[0, 2]], 1.0)


def test_a_future_token_changes_nothing_and_every_layer_learns():
    model, params = built("gqa", layer_types=MIXED)
    ids = random_ids()

    def loss(params):
        return model.apply({"params": params}, ids, attention="sparse").logits[0, 10].sum()

    gradients = parameter_paths(jax.jit(jax.grad(loss))(params))
    for path, leaf in gradients.items():
        assert np.any(leaf) != is_indexer_path(path), path
    later = ids.at[0, 11:].set(0)
    run = lambda ids: forward(model, params, ids, attention="sparse").logits[0, :11]
    np.testing.assert_array_equal(run(ids), run(later))


def test_an_indexer_learns_from_the_layer_that_shares_across_a_dense_one():
    apart, params = built("gqa", layer_types=MIXED)
    distilled, _ = built("gqa", layer_types=MIXED, variant=(("distill_shared", True),))
    run = lambda model: np.asarray(forward(model, params, random_ids(), attention="sparse", indexer_loss="sparse").indexer_kl)
    own, mean = run(apart), run(distilled)
    assert mean[1] != own[1] and not np.any(mean[[0, 2, 3]])


@pytest.mark.parametrize(
    ("layer_types", "window", "message"),
    [
        (("full",), 0, "layer_types has 1 entries; expected one per layer"),
        (("full", "windw"), 0, "layer_types is 'windw'; expected one of full, shared, dense, window.* Did you mean 'window'"),
        (("full", "window"), 0, "model.attention.window is 0; expected a positive number"),
        (("dense", "dense"), 0, "no 'full' layer, so no layer has an indexer"),
        (("dense", "shared"), 0, "no 'full' layer"),
        (("shared", "full"), 0, "a 'shared' layer before the first 'full' one"),
    ],
)
def test_layers_that_cannot_be_are_refused(layer_types, window, message):
    config = small_config()
    config.attention.layer_types, config.attention.window = layer_types, window
    with pytest.raises(ConfigError, match=message):
        config.validate()
