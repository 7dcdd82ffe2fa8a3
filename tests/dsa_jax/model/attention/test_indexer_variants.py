"""The indexer's variants for ablations: each against a few lines of float64, forward and backward, and what refuses them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.checkpoints.hf import CheckpointError
from dsa_jax.checkpoints.hf.write_config import choose_layout
from dsa_jax.config import AttentionConfig, ConfigError, IndexerConfig, ModelConfig
from dsa_jax.config.fields import frozen
from dsa_jax.model.attention.indexer import Indexer
from dsa_jax.params import is_indexer_path, parameter_paths
from pallas_kernels import Visible, dense_attention, indexer_kl
from tests.dsa_jax.model.small import built, forward, random_ids, small_config

T, E, HEADS, DIM = 9, 12, 3, 8
CAUSAL = Visible(jnp.zeros((1, T), jnp.int32), jnp.arange(1, T + 1, dtype=jnp.int32)[None])


def indexer(**fields):
    """Without rotation, which has its own tests."""
    config = IndexerConfig(enabled=True, n_heads=HEADS, head_dim=DIM, rope_dim=0, **fields)
    model = ModelConfig(hidden_dim=E, initializer_range=0.5, attention=AttentionConfig(indexer=config))
    return Indexer(frozen(model), q_input_dim=E)


def written_out(params, x, target, activation):
    """KL per query for one row `x` [T, E] and the attention probabilities `target` [T, T], in the dtype given."""
    q = (x @ params["wq_b"]["kernel"]).reshape(T, HEADS, DIM)
    k = x @ params["wk"]["kernel"]
    k = (k - k.mean(-1, keepdims=True)) / jnp.sqrt(k.var(-1, keepdims=True) + 1e-6)
    k = k * params["k_norm"]["scale"] + params["k_norm"]["bias"]
    weights = x @ params["weights_proj"]["kernel"] if "weights_proj" in params else jnp.ones((T, HEADS))
    products, causal = jnp.einsum("thd,sd->ths", q, k) * DIM**-0.5, jnp.tril(jnp.ones((T, T), bool))
    activate = {"relu": jax.nn.relu, "none": lambda u: u}[activation]
    scores = jnp.einsum("th,ths->ts", weights * HEADS**-0.5, activate(products))
    log_softmax = jax.nn.log_softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
    return jnp.where(causal, target * (jnp.log(jnp.where(causal, target, 1)) - jnp.where(causal, log_softmax, 0)), 0).sum(-1)


@functools.cache
def arrays():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    return draw(1, T, E), draw(1, T, 2, 4), draw(1, T, 1, 4), draw(1, T)


@pytest.mark.parametrize("head_weights", ["learned", "constant"])
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_kl_and_every_gradient_match_float64(activation, head_weights):
    x, q, k, d_kl = arrays()
    module = indexer(activation=activation, head_weights=head_weights)
    params = module.init(jax.random.key(1), x, x, jnp.arange(T)[None])["params"]
    params["k_norm"] = {"scale": jnp.linspace(0.5, 1.5, DIM), "bias": jnp.linspace(-0.3, 0.3, DIM)}
    assert ("weights_proj" in params) == (head_weights == "learned")
    lse = dense_attention(q, k, None, CAUSAL, softmax_scale=1.0, implementation="reference").lse

    def loss(params, x):
        index = module.apply({"params": params}, x, x, jnp.arange(T)[None])
        return (indexer_kl(index, CAUSAL, q, k, lse, softmax_scale=1.0, activation=activation) * d_kl).sum()

    value, (gradients, d_x) = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)
    assert not np.any(d_x)  # the model learns nothing from the KL
    with jax.enable_x64(True):
        wide = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), tree)
        logits = jnp.einsum("thd,sd->ths", *(wide(a) for a in (q[0], k[0, :, 0])))
        probability = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((T, T), bool))[:, None], logits, -jnp.inf), axis=-1).mean(1)
        expected, wanted = jax.value_and_grad(
            lambda params, x: (written_out(params, x[0], probability, activation) * wide(d_kl)[0]).sum()
        )(wide(params), wide(x))
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        for got, want in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(got, want, atol=2e-5 * max(1.0, float(jnp.abs(want).max())))


def test_the_kl_reaches_the_indexer_and_nothing_else():
    ids = random_ids()
    model, params = built("mla")
    loss = lambda p: model.apply({"params": p}, ids, attention="sparse", indexer_loss="sparse").indexer_kl.sum()
    for path, leaf in parameter_paths(jax.jit(jax.grad(loss))(params)).items():
        assert np.any(leaf) == is_indexer_path(path), path


@pytest.mark.parametrize("attention", ["sparse", "coarse_to_fine"])
def test_forced_keys_are_selected_in_every_layer_and_the_kl_measures_the_set_with_them(attention):
    model, params = built("mla", variant=(("forced_sink", 2), ("forced_local", 1)))
    free, _ = built("mla")
    out = forward(model, params, random_ids(), attention=attention, indexer_loss="sparse", everything=True)
    plain = forward(free, params, random_ids(), attention=attention, indexer_loss="sparse", everything=True)
    picked = np.asarray(out.topk_indices)
    for t in range(5, picked.shape[2]):
        assert (picked[:, :, t, :2] == [0, 1]).all() and (picked[:, :, t, -1] == t).all()
    assert np.any(picked[0] != plain.topk_indices[0]) and abs(float(out.indexer_kl[0] - plain.indexer_kl[0])) > 1e-4


@pytest.mark.parametrize(("name", "value"), [("activation", "none"), ("head_weights", "constant"), ("forced_local", 2)])
def test_a_hugging_face_export_refuses_what_no_format_holds(name, value):
    config = small_config("mla_plain")
    setattr(config.attention.indexer, name, value)
    with pytest.raises(CheckpointError, match=f"model.attention.indexer has {name}={value!r}; expected the defaults"):
        choose_layout(config)


def test_how_an_indexer_was_trained_is_no_part_of_a_checkpoint():
    config = small_config("mla_float")
    plain = choose_layout(config)
    config.attention.indexer.distill_shared = True
    assert choose_layout(config) == plain


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"forced_sink": -1}, "indexer.forced_sink is -1; expected zero or more"),
        ({"forced_sink": 3, "forced_local": 2}, r"forced_local 2; expected fewer than topk \(5\) together"),
        ({"activation": "gelu"}, "indexer.activation is 'gelu'; expected one of relu, none"),
        ({"head_weights": "uniform"}, "indexer.head_weights is 'uniform'; expected one of learned, constant"),
    ],
)
def test_a_variant_that_does_not_exist_is_refused(fields, message):
    config = small_config()
    for name, value in fields.items():
        setattr(config.attention.indexer, name, value)
    with pytest.raises(ConfigError, match=message):
        config.validate()


def test_an_activation_that_kernels_cannot_serve_is_refused():
    config = small_config()
    config.attention.indexer.activation = "none"
    config.validate()
    config.attention.implementation = "index_topk=pallas"
    with pytest.raises(ConfigError, match=r"activation is 'none', which the kernels of .*=pallas' do not have"):
        config.validate()
