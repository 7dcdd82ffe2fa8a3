"""An indexer that learns from every layer it serves: against the KL from the mean of their distributions, written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.config import ConfigError
from dsa_jax.model.attention.gqa import GQA
from dsa_jax.model.attention.indexer import Indexer
from dsa_jax.model.attention.visibility import causal_visibility
from dsa_jax.model.outputs import AttentionRequest, LayerContext
from dsa_jax.params import is_indexer_path, parameter_paths
from pallas_kernels import IndexHeads, Visible, index_scores, indexer_kl
from tests.dsa_jax.model.small import LENGTH, built, forward, random_ids, small_config

DISTILLED = (("distill_shared", True),)
SHARED = ("full", "shared", "shared")


def test_the_mean_of_the_losses_has_the_gradient_of_the_loss_against_the_mean():
    """Three layers' targets and one indexer, in float64; the values differ by the same number whatever the indexer."""
    rng = np.random.default_rng(0)
    visible = Visible(jnp.zeros((1, 7), jnp.int32), jnp.arange(1, 8, dtype=jnp.int32)[None])
    causal = jnp.tril(jnp.ones((7, 7), bool))
    with jax.enable_x64(True):
        draw = lambda *shape: jnp.asarray(rng.standard_normal(shape))
        layers = [(draw(1, 7, 2, 4), draw(1, 7, 1, 4)) for _ in range(3)]
        logits = [jnp.where(causal, jnp.einsum("bthd,bsd->bhts", q, k[:, :, 0]), -jnp.inf) for q, k in layers]
        lse = [jax.nn.logsumexp(x, axis=-1).swapaxes(1, 2) for x in logits]
        mean = sum(jax.nn.softmax(x, axis=-1).mean(1) for x in logits) / 3

        def of_mean(index):
            log_softmax = jax.nn.log_softmax(index_scores(index, visible), axis=-1)
            return jnp.where(causal, mean * (jnp.log(jnp.where(causal, mean, 1)) - jnp.where(causal, log_softmax, 0)), 0).sum()

        def mean_of(index):
            each = [
                indexer_kl(index, visible, q, k, x, softmax_scale=1.0, implementation="xla").sum()
                for (q, k), x in zip(layers, lse, strict=True)
            ]
            return sum(each) / 3

        constants = []
        for _ in range(2):
            index = IndexHeads(draw(1, 7, 2, 4), draw(1, 7, 4), draw(1, 7, 2))
            (a, wanted), (b, got) = (jax.value_and_grad(f)(index) for f in (of_mean, mean_of))
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-12), got, wanted)
            constants.append(b - a)
        np.testing.assert_allclose(*constants, rtol=1e-10)
        assert constants[0] > 0.1


def layer_params(params, number):
    """Parameters of one of three layers (full, shared, shared)."""
    stack = params["dense_layers_0"] if number == 0 else params["dense_layers_1"]
    return jax.tree.map(lambda leaf: leaf[max(number - 1, 0)], stack)


@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_model_loss_and_gradient_are_those_of_the_mean_distribution(stage):
    model, params = built("gqa", layer_types=SHARED, variant=DISTILLED)
    ids = random_ids(1)
    positions, visible = jnp.arange(LENGTH)[None], causal_visibility(jnp.ones_like(ids))
    request = AttentionRequest(stage, stage)

    # Layer by layer: what each attends to, and its distribution over the keys in the set.
    x, topk, hidden, distributions = params["embed"]["embedding"][ids], None, None, []
    members = jnp.tril(jnp.ones((1, LENGTH, LENGTH), bool))
    for number in range(3):
        block, own = model.stacks[min(number, 1)].block, layer_params(params, number)
        scale = own["attention_norm"]["scale"]
        normed = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale
        hidden = normed if hidden is None else hidden
        heads = GQA(model.config, block.layer).apply({"params": own["attention"]}, normed, positions, method="heads")
        x, statistics = block.apply({"params": own}, x, LayerContext(positions, visible, topk), request)
        topk = statistics.topk_indices
        if stage == "sparse":
            members = (topk[..., None] == jnp.arange(LENGTH)).any(2)
        logits = jnp.einsum("bthd,bshd->bhts", heads.q, jnp.repeat(heads.k, 2, axis=2)) * 16**-0.5
        distributions.append(jax.nn.softmax(jnp.where(members[:, None], logits, -jnp.inf), axis=-1).mean(1))
    mean = sum(distributions) / 3

    def written_out(own):
        index = Indexer(model.config, model.config.hidden_dim).apply({"params": own}, hidden, hidden, positions)
        scores = index_scores(index, visible)
        log_softmax = jax.nn.log_softmax(jnp.where(members, scores, -jnp.inf), axis=-1)
        against = lambda p: jnp.where(p > 0, p * (jnp.log(jnp.where(p > 0, p, 1)) - jnp.where(p > 0, log_softmax, 0)), 0)
        return against(mean).sum(-1).mean(), sum(against(p).sum(-1).mean() for p in distributions) / 3

    def loss(params):
        kl = model.apply({"params": params}, ids, attention=stage, indexer_loss=stage, return_logits=False).indexer_kl
        return kl.sum(), kl

    gradients, kl = jax.jit(jax.grad(loss, has_aux=True))(params)
    wanted, value = jax.grad(written_out, has_aux=True)(layer_params(params, 0)["attention"]["indexer"])
    np.testing.assert_allclose(kl, [float(value), 0, 0], rtol=1e-4)
    got = gradients["dense_layers_0"]["attention"]["indexer"]
    for path, leaf in parameter_paths(wanted).items():
        np.testing.assert_allclose(parameter_paths(got)[path][0], leaf, atol=2e-6, rtol=1e-3, err_msg=path)
    for path, leaf in parameter_paths(gradients).items():
        assert np.any(leaf) == is_indexer_path(path), path


def test_scan_unroll_and_remat_agree_across_kinds_of_layers():
    """Three indexers; the first serves across the change from a dense MLP to experts, the second only itself."""
    types, ids = ("full", "shared", "full", "full", "shared"), random_ids(1)
    kinds = {"layer_types": types, "moe": True, "variant": DISTILLED}

    def gradients(**fields):
        model, params = built("gqa", **kinds, **fields)[0], built("gqa", **kinds)[1]

        def loss(params):
            kl = model.apply({"params": params}, ids, attention="sparse", indexer_loss="sparse", return_logits=False).indexer_kl
            return kl.sum(), kl

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    expected, kl = gradients()
    assert (np.asarray(kl) > 0).tolist() == [kind == "full" for kind in types]
    for path, leaf in parameter_paths(gradients(scan_layers=False, remat="full")[0]).items():
        np.testing.assert_allclose(leaf, parameter_paths(expected)[path], atol=1e-6, err_msg=path)
    model, params = built("gqa", **(kinds | {"variant": ()}))
    alone = forward(model, params, ids, attention="sparse", indexer_loss="sparse").indexer_kl
    np.testing.assert_allclose(kl[2], alone[2], rtol=1e-5)
    assert abs(float(kl[0] - alone[0])) > 1e-4 and abs(float(kl[3] - alone[3])) > 1e-4


def test_nothing_to_learn_from_is_refused():
    config = small_config()
    config.attention.indexer.distill_shared = True
    with pytest.raises(ConfigError, match="distill_shared is True, but layer_types has no 'shared' layer"):
        config.validate()
