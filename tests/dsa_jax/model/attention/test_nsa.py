"""Native sparse attention: against its definition over whole arrays, causality, degenerate cases, and what refuses it."""

import copy
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dsa_jax.checkpoints.hf import CheckpointError, save_pretrained
from dsa_jax.checkpoints.open import open_checkpoint
from dsa_jax.config import AttentionConfig, ConfigError, ModelConfig, NSAConfig, StageConfig
from dsa_jax.config.fields import frozen
from dsa_jax.dryrun import summarize
from dsa_jax.generation import generate
from dsa_jax.model import build_model, init_params
from dsa_jax.model.attention.attend import Attention
from dsa_jax.model.attention.kinds import is_of_own_mode
from dsa_jax.model.attention.nsa import Branch, Compressor, NSABranches, attend_natively, block_geometry
from dsa_jax.model.attention.visibility import causal_visibility
from dsa_jax.model.outputs import AttentionRequest
from dsa_jax.parallel.mesh import BATCH_AXES
from dsa_jax.parallel.rules import parameter_spec
from dsa_jax.params import nested_parameters, parameter_paths
from dsa_jax.retrofit import retrofit
from dsa_jax.train.init import at_start_of_stage, initial_params, load_run, resolve_run
from tests.dsa_jax.model.small import VOCAB, built, forward, random_ids, small_config
from tests.dsa_jax.parallel.meshes import mesh
from tests.dsa_jax.train.test_stages import assert_one_update_moves_what_learns
from tests.dsa_jax.train.tiny import tiny_config

NSA = NSAConfig(
    compress_block=4, compress_stride=2, select_block=8, n_select_blocks=3, n_initial_blocks=1, n_local_blocks=1, window=5
)
GEOMETRY, WINDOW = block_geometry(NSA), NSA.window
LENGTH = 43  # ragged in strides and blocks
SEGMENTS = jnp.asarray([[1] * LENGTH, [1] * 3 + [2] * 18 + [3] * 17 + [0] * 5])


def whole_attention(q, k, v, mask):
    """Softmax attention under a mask [B, T, H, S]; 0 where nothing is visible."""
    heads = q.shape[2] // k.shape[2]
    logits = jnp.einsum("bthd,bshd->bths", q, jnp.repeat(k, heads, 2)) * q.shape[-1] ** -0.5
    some = mask.any(-1, keepdims=True)
    p = jax.nn.softmax(jnp.where(mask | ~some, logits, -jnp.inf), axis=-1) * some
    return jnp.einsum("bths,bshd->bthd", p, jnp.repeat(v, heads, 2)), p


def naive(q, select, branches, segment_ids, geometry=GEOMETRY, window=WINDOW):
    """The definition, with T x S masks and one sort: (out, keys read by query)."""
    (batch, length, n_heads), groups = q.shape[:3], select.k.shape[2]
    place = jnp.arange(length)
    sees = (segment_ids[:, :, None] == segment_ids[:, None]) & (place <= place[:, None]) & (segment_ids > 0)[:, :, None]
    of_heads = lambda mask: jnp.broadcast_to(mask[:, :, None], (*mask.shape[:2], n_heads, mask.shape[2]))
    n_compressed, n_blocks = branches.compress.k.shape[1], -(-length // geometry.select_block)
    covers = jnp.stack(
        [(place // geometry.compress_stride >= i) & (place < i * geometry.compress_stride + geometry.compress_block)
         for i in range(n_compressed)]
    )  # fmt: skip
    whole = (sees[:, :, None] | ~covers).all(-1)
    coarse, p = whole_attention(q, *branches.compress, of_heads(whole))
    in_block = place // geometry.select_block == jnp.arange(n_blocks)[:, None]
    overlap = (covers[:, None] & in_block).sum(-1) / geometry.compress_stride
    score = jnp.einsum("btghn,nj->btgj", p.reshape(batch, length, groups, -1, n_compressed), overlap)
    visible = (sees[:, :, None] & in_block).any(-1)[:, :, None]
    rank = jnp.cumsum(visible, -1)
    forced = visible & ((rank <= geometry.n_initial) | (visible.sum(-1, keepdims=True) - rank < geometry.n_local))
    score = jnp.where(forced, jnp.inf, jnp.where(visible, score, -jnp.inf))
    order = jnp.argsort(-score, axis=-1, stable=True)[..., : geometry.topk]
    chosen = (jax.nn.one_hot(order, n_blocks).sum(-2) > 0) & visible
    reads = (chosen[..., None] & in_block).any(-2) & sees[:, :, None]
    fine, _ = whole_attention(q, *select, jnp.repeat(reads, n_heads // groups, axis=2))
    near = sees & (place > place[:, None] - window)
    local, _ = whole_attention(q, *branches.window, of_heads(near))
    out = sum(branches.gates[..., i, None] * part for i, part in enumerate((coarse, fine, local)))
    return out, whole.sum(-1) + reads.sum(-1).mean(-1) + near.sum(-1)


def random_heads(length=LENGTH, groups=2, heads=4, dim=8, dtype=np.float32):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal((2, *shape)), dtype)
    branch = lambda n: Branch(draw(n, groups, dim), draw(n, groups, dim))
    gates = jax.nn.sigmoid(draw(length, heads, 3))
    return draw(length, heads, dim), branch(length), NSABranches(branch(GEOMETRY.n_compressed(length)), branch(length), gates)


@functools.partial(jax.jit, static_argnames=("implementation", "nsa"))
def attend(q, select, branches, segment_ids=SEGMENTS, *, implementation="xla", nsa=NSA):
    config = AttentionConfig(kind="nsa", nsa=nsa, implementation=implementation)
    call = Attention(config, q.shape[-1] ** -0.5, AttentionRequest("nsa", coverage=True))
    return attend_natively(call, q, select, branches, causal_visibility(segment_ids))


def loss_and_gradients(function, heads, d_out):
    loss = lambda heads: jnp.sum(function(*heads)[0] * d_out)
    return jax.jit(jax.value_and_grad(loss))(heads)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_equals_the_definition_with_its_gradients(implementation):
    """Whole row, packed segments, one too short for a compressed key, padding; the definition in float64."""
    heads = random_heads()
    d_out = jnp.asarray(np.random.default_rng(1).standard_normal(heads[0].shape), jnp.float32)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), (heads, d_out))
        expected, n_keys = jax.jit(naive)(*wide[0], jnp.asarray(np.asarray(SEGMENTS)))
        _, gradients = loss_and_gradients(lambda *heads: naive(*heads, jnp.asarray(np.asarray(SEGMENTS))), *wide)
    got = attend(*heads, implementation=implementation)
    np.testing.assert_allclose(got.out, expected, atol=1e-5)
    valid = np.asarray(SEGMENTS) > 0
    np.testing.assert_allclose(got.keys_per_query, np.asarray(n_keys)[valid].mean(), rtol=1e-6)
    assert np.all(np.asarray(got.out)[~valid] == 0) and 0 < float(got.coverage) < 1
    _, ours = loss_and_gradients(lambda *heads: attend(*heads, implementation=implementation), heads, d_out)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), ours, gradients)


def test_a_query_that_sees_no_compressed_key_gets_the_other_branches():
    """The first three queries of a row: with gates 1, 1 and 1 the sum of selection and window, nothing from compression."""
    q, select, branches = random_heads()
    ones = branches._replace(gates=jnp.ones_like(branches.gates))
    poisoned = ones._replace(compress=Branch(*(x.at[0, 0].set(1e6) for x in ones.compress)))
    early = np.asarray(attend(q, select, ones).out)[0, :3]
    np.testing.assert_array_equal(np.asarray(attend(q, select, poisoned).out)[0, :3], early)
    assert not np.array_equal(np.asarray(attend(q, select, poisoned).out)[0, 3], np.asarray(attend(q, select, ones).out)[0, 3])


def test_selecting_everything_with_one_gate_open_is_dense_attention():
    q, select, branches = random_heads()
    everything = dataclasses.replace(NSA, n_select_blocks=6, window=LENGTH)
    for i, branch in ((1, select), (2, branches.window)):
        gates = jnp.zeros_like(branches.gates).at[..., i].set(1.0)
        got = attend(q, select, branches._replace(gates=gates), nsa=everything)
        place = jnp.arange(LENGTH)
        mask = (SEGMENTS[:, :, None] == SEGMENTS[:, None]) & (place <= place[:, None]) & (SEGMENTS > 0)[:, :, None]
        dense, _ = whole_attention(q, *branch, jnp.broadcast_to(mask[:, :, None], (2, LENGTH, 4, LENGTH)))
        np.testing.assert_allclose(got.out, dense, atol=1e-5)
    np.testing.assert_allclose(got.coverage, 1.0, rtol=1e-6)


@pytest.mark.parametrize("length", [1, 3, 9, 10])
def test_an_untrained_compressor_is_the_mean(length):
    config = ModelConfig(initializer_range=0.3, attention=AttentionConfig(kind="nsa", head_dim=8, nsa=NSA))
    compressor = Compressor(frozen(config))
    x = jax.random.normal(jax.random.key(0), (2, length, 3, 8))
    params = compressor.init(jax.random.key(1), x)
    expected = [x[:, i : i + 4].mean(1) for i in range(0, length - 3, 2)]
    got = compressor.apply(params, x)
    assert got.shape == (2, len(expected), 3, 8)
    np.testing.assert_allclose(got, np.stack(expected, 1) if expected else got, atol=1e-6)


def nsa_fields(**fields):
    return NSAConfig(**({"compress_block": 4, "compress_stride": 2, "select_block": 8, "window": 5} | fields))


@functools.cache
def model_and_params(kind="gqa"):
    config = small_config(kind)
    config.attention.kind, config.attention.nsa = "nsa", nsa_fields(n_select_blocks=3, n_local_blocks=1)
    model = build_model(config)
    params = init_params(model, jax.random.key(0))
    noise = lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape, leaf.dtype)
    return model, jax.tree.map(noise, params)


def test_no_gradient_from_the_future_or_from_other_segments():
    """Exactly zero through all three branches, the compressor and the gates; and every parameter of NSA learns."""
    model, params = model_and_params("gqa_qwen")
    segments = jnp.asarray([[1] * 5 + [2] * 19])
    query, unused_token = 15, 40

    def loss(params):
        output = model.apply({"params": params}, jnp.arange(24)[None], segment_ids=segments, attention="nsa")
        return output.logits[0, query, unused_token]

    gradients = jax.jit(jax.grad(loss))(params)
    moved = np.abs(np.asarray(gradients["embed"]["embedding"][:24])).sum(-1) > 0
    np.testing.assert_array_equal(np.flatnonzero(moved), np.arange(5, query + 1))
    for path, leaf in parameter_paths(gradients).items():
        if is_of_own_mode(path):
            assert np.abs(np.asarray(leaf)).max() > 0, path


def test_dense_attention_leaves_nsa_alone():
    model, params = model_and_params()
    same, own = built("gqa")
    without = {path: leaf for path, leaf in parameter_paths(params).items() if not is_of_own_mode(path)}
    assert without.keys() == parameter_paths(own).keys()
    np.testing.assert_array_equal(
        forward(model, params, random_ids(), attention="dense").logits,
        forward(same, nested_parameters(without), random_ids(), attention="dense").logits,
    )


def test_what_cannot_be_done_is_refused():
    model, params = model_and_params()
    run = functools.partial(model.apply, {"params": params}, random_ids(), attention="nsa")
    with pytest.raises(NotImplementedError, match="selects blocks for each key-value group"):
        run(return_topk_indices=True)
    with pytest.raises(ValueError, match="learns from the model's loss alone"):
        run(indexer_loss="sparse")
    with pytest.raises(NotImplementedError, match="cannot run over a cache"):
        run(jnp.ones(2, jnp.int32), model.init_cache(2, 32), method="extend")
    plain, plain_params = built("gqa")
    with pytest.raises(ValueError, match="whose weights the model lacks"):
        plain.apply({"params": plain_params}, random_ids(), attention="nsa")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"compress_stride": 3}, "compress_block is 4; expected a multiple of compress_stride"),
        ({"select_block": 9}, "select_block is 9; expected a multiple of compress_stride"),
        ({"n_select_blocks": 2}, "expected at least the 3 blocks"),
        ({"window": 0}, "nsa.window is 0"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(fields, message):
    config = small_config()
    config.attention.kind, config.attention.nsa = "nsa", nsa_fields(**fields)
    with pytest.raises(ConfigError, match=message):
        config.validate()


def test_a_stage_trains_the_branches_under_their_own_mode_only():
    config = tiny_config()
    config.model.attention.kind, config.model.attention.nsa = "nsa", stage_nsa()
    assert_one_update_moves_what_learns(config, "pretrain", "nsa")


def stage_nsa():
    return NSAConfig(compress_block=4, compress_stride=2, select_block=4, n_select_blocks=3, n_local_blocks=1, window=3)


@pytest.fixture(scope="module")
def turned(tmp_path_factory):
    """(recipe, parameters of the dense run, directory of the run that went on from it under native sparse attention)."""
    directory = tmp_path_factory.mktemp("nsa")
    config = tiny_config(steps=2)
    config.model.attention.qk_norm, config.model.attention.use_bias = True, True
    config.model.attention.indexer.enabled, config.train.warmup.steps = False, 0
    config.eval.rows = ("dense", "nsa")
    dense = dataclasses.replace(config, train=dataclasses.replace(config.train, sparse=StageConfig()))
    retrofit(dense, directory / "dense")
    config.model.attention.kind, config.model.attention.nsa, config.train.sparse_attention = "nsa", stage_nsa(), "nsa"
    config.train.pretrain, config.init.checkpoint = StageConfig(), str(directory / "dense")
    retrofit(config, directory / "nsa")
    return config, load_run(directory / "dense").params, directory / "nsa"


def test_a_dense_model_turns_to_native_sparse_attention(turned):
    """Branches start as copies of the layer's own projections, everything else as it was."""
    config, dense, directory = turned
    config = copy.deepcopy(config)
    started = parameter_paths(at_start_of_stage(initial_params(config, build_model(config.model)), config, "sparse"))
    for path, leaf in parameter_paths(dense).items():
        np.testing.assert_array_equal(started[path], leaf, err_msg=path)
        folder, _, rest = path.rpartition("/attention/")
        if rest.split("/")[0] in ("wk", "wv", "k_norm"):
            for branch in ("compress", "window"):
                np.testing.assert_array_equal(started[f"{folder}/attention/nsa/{branch}_{rest}"], leaf, err_msg=path)
    report = json.loads((directory / "report.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["dense, before sparse training", "dense", "native sparse attention"]
    assert load_run(directory).model.config.attention.mode == "nsa"


def test_a_run_that_starts_from_native_sparse_attention_keeps_its_branches(turned, tmp_path):
    config, _, directory = turned
    config = copy.deepcopy(config)
    config.init.checkpoint = str(directory)
    with pytest.raises(ConfigError, match=r"model.attention.mode is 'dense', but .* init.checkpoint .* trained under 'nsa'"):
        initial_params(config, build_model(config.model))
    config = resolve_run(config, tmp_path)
    assert config.model.attention.mode == "nsa"
    again = at_start_of_stage(initial_params(config, build_model(config.model)), config, "sparse")
    jax.tree.map(np.testing.assert_array_equal, again, load_run(directory).params)


def test_what_native_sparse_attention_has_no_form_of_is_refused(turned, tmp_path):
    config, _, directory = turned
    pretrained = open_checkpoint(directory)
    with pytest.raises(ConfigError, match="'nsa' cannot run over a cache"):
        generate(pretrained, [[1, 2]], max_new_tokens=2)
    with pytest.raises(CheckpointError, match="no published checkpoint format holds the weights of native sparse attention"):
        save_pretrained(tmp_path / "hf", pretrained.config, pretrained.params)
    summary = summarize(config)
    trainable = summary["parameters"]["trainable"]
    assert trainable["sparse"] == summary["parameters"]["total"] > trainable["pretrain"] > 0
    assert summary["stages"]["sparse"]["activations"]["layer"] > 0


def test_a_mode_that_layers_of_another_kind_cannot_answer_is_refused():
    recipe = tiny_config()
    recipe.train.sparse_attention = "nsa"
    with pytest.raises(ConfigError, match="sparse_attention is 'nsa', whose weights the model lacks"):
        recipe.validate()
    config = small_config()
    config.attention.layer_types, config.attention.mode = ("full", "nsa"), "nsa"
    with pytest.raises(ConfigError, match="mode is 'nsa', whose weights the model lacks in some layers"):
        config.validate()


BATCH, ROW = 8, 32


@functools.partial(jax.jit, static_argnums=0)
def everything(model, params, input_ids, segment_ids):
    def loss(params):
        output = model.apply({"params": params}, input_ids, segment_ids=segment_ids, attention="nsa", return_coverage=True)
        log_p = jax.nn.log_softmax(output.logits[:, :-1])
        nll = -jnp.take_along_axis(log_p, input_ids[:, 1:, None], axis=-1).mean()
        return nll, (nll, output.keys_per_query, output.coverage)

    (_, results), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return results, gradients


def batch():
    rng = np.random.default_rng(1)
    segment_ids = np.ones((BATCH, ROW), np.int32)
    segment_ids[1, 10:], segment_ids[2, 20:], segment_ids[3] = 2, 0, 0
    return jnp.asarray(rng.integers(0, VOCAB, (BATCH, ROW)), jnp.int32), jnp.asarray(segment_ids)


def test_eight_devices_compute_what_one_does():
    model, params = model_and_params()
    expected, expected_gradients = jax.device_get(everything(model, params, *batch()))
    on = mesh("fsdp2_tp2_cp2")
    placed = nested_parameters(
        {path: jax.device_put(leaf, NamedSharding(on, parameter_spec(path))) for path, leaf in parameter_paths(params).items()}
    )
    with jax.set_mesh(on):
        tokens = jax.device_put(batch(), NamedSharding(on, PartitionSpec(BATCH_AXES)))
        results, gradients = jax.device_get(everything(model, placed, *tokens))
    for got, wanted in zip(results, expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5)
    wanted = parameter_paths(expected_gradients)
    for path, gradient in parameter_paths(gradients).items():
        scale = np.abs(wanted[path]).max()
        np.testing.assert_allclose(gradient, wanted[path], rtol=1e-5, atol=1e-5 * scale + 1e-12, err_msg=path)
