"""The whole model: causality, packing, equality of forms, and what each loss may touch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.model import build_model, init_params
from dsa_jax.model.attention.attend import TOPK_NAME
from dsa_jax.model.inputs import check_inputs, check_new_tokens
from dsa_jax.params import is_indexer_path, is_score_bias_path, parameter_paths
from tests.dsa_jax.model.small import LENGTH, VOCAB, built, forward, random_ids, small_config

KINDS = ["gqa", "gqa_qwen", "mla", "mla_plain"]


@pytest.mark.parametrize("kind", KINDS)
def test_sparse_with_everything_selected_equals_dense(kind):
    model, params = built(kind, topk=LENGTH)
    dense = forward(model, params, random_ids(), attention="dense", indexer_loss="dense", everything=True)
    sparse = forward(model, params, random_ids(), attention="sparse", indexer_loss="sparse", everything=True)
    np.testing.assert_allclose(sparse.logits, dense.logits, atol=2e-4)
    np.testing.assert_allclose(sparse.indexer_kl, dense.indexer_kl, atol=1e-5)
    np.testing.assert_allclose(sparse.coverage, 1.0, atol=1e-5)
    np.testing.assert_allclose(sparse.keys_per_query, dense.keys_per_query)
    assert float(dense.logits.std()) > 0.1 and np.all(np.asarray(dense.indexer_kl) > 1e-4)


def test_the_default_implementations_agree_with_the_references():
    _, params = built("mla", topk=LENGTH - 4)
    outputs = [
        forward(
            built("mla", topk=LENGTH - 4, implementation=name)[0],
            params,
            random_ids(),
            attention="sparse",
            indexer_loss="sparse",
            everything=True,
        )
        for name in ("auto", "reference")
    ]
    np.testing.assert_allclose(outputs[0].logits, outputs[1].logits, atol=2e-4)
    np.testing.assert_allclose(outputs[0].indexer_kl, outputs[1].indexer_kl, atol=1e-5)
    np.testing.assert_array_equal(outputs[0].topk_indices[0], outputs[1].topk_indices[0])


@pytest.mark.parametrize("kind", ["gqa", "mla"])
def test_packed_segments_and_padding_equal_separate_rows(kind):
    model, params = built(kind, moe=kind == "mla")
    ids = random_ids()
    packed_segments = jnp.array([[1] * 10 + [2] * 9 + [0] * 5, [0] * LENGTH], jnp.int32)
    packed = forward(model, params, ids, packed_segments, attention="sparse", indexer_loss="sparse", everything=True)
    ids = ids[:1]
    first = jnp.pad(ids[:, :10], ((0, 0), (0, LENGTH - 10)))
    second = jnp.pad(ids[:, 10:19], ((0, 0), (0, LENGTH - 9)), constant_values=3)
    rows = jnp.concatenate([first, second])
    alone_segments = jnp.array([[1] * 10 + [0] * 14, [7] * 9 + [0] * 15], jnp.int32)
    alone = forward(model, params, rows, alone_segments, attention="sparse", indexer_loss="sparse", everything=True)
    np.testing.assert_allclose(packed.logits[0, :10], alone.logits[0, :10], atol=1e-4)
    np.testing.assert_allclose(packed.logits[0, 10:19], alone.logits[1, :9], atol=1e-4)
    # Every mean runs over the same 19 queries, whatever stands in the padding and however much of it there is.
    np.testing.assert_allclose(packed.indexer_kl, alone.indexer_kl, rtol=1e-4)
    np.testing.assert_allclose(packed.coverage, alone.coverage, rtol=1e-4)
    np.testing.assert_allclose(packed.keys_per_query, alone.keys_per_query)
    assert np.all(np.asarray(packed.topk_indices[:, :, 19:]) == -1)
    selected = np.asarray(packed.topk_indices[:, 0, 10:19])
    assert np.all((selected == -1) | (selected >= 10))
    if packed.moe is not None:
        np.testing.assert_array_equal(packed.moe.expert_counts, alone.moe.expert_counts)
        np.testing.assert_allclose(packed.moe.expert_counts.sum(-1), 19 * 2)
        assert np.isfinite(np.asarray(packed.moe.balance_loss)).all()


@pytest.mark.parametrize(("kind", "attention"), [("mla", "sparse"), ("gqa", "dense")])
def test_no_gradient_from_the_future_or_from_other_segments(kind, attention):
    model, params = built(kind)
    ids, segments = random_ids(1), jnp.array([[1] * 8 + [2] * 16], jnp.int32)
    # Distinct tokens at the positions in question, so that a row of the table stands for one position.
    ids = ids.at[0].set(jnp.arange(LENGTH) + 20)

    @jax.jit
    def gradient(table):
        def logit(table):
            moved = {**params, "embed": {"embedding": table}}
            out = model.apply(
                {"params": moved}, ids, segment_ids=segments, attention=attention, return_logits=False, return_hidden=True
            )
            return out.hidden[0, 15].sum() + out.hidden[0, 15, 0] ** 2

        return jax.grad(logit)(table)

    per_position = np.abs(np.asarray(gradient(params["embed"]["embedding"])))[20 : 20 + LENGTH].max(axis=-1)
    assert np.all(per_position[16:] == 0.0), "the future reaches the past"
    assert np.all(per_position[:8] == 0.0), "another segment is visible"
    assert per_position[15] > 0 and np.count_nonzero(per_position[8:15]) >= 4


def test_scan_unroll_and_every_remat_policy_give_the_same_gradients():
    kind, ids = "gqa", random_ids()

    def gradients(**fields):
        model, _ = built(kind, **fields)
        _, params = built(kind)

        def loss(params):
            out = model.apply({"params": params}, ids, attention="sparse", indexer_loss="sparse")
            return jax.nn.logsumexp(out.logits, axis=-1).mean() + out.indexer_kl.sum()

        return jax.jit(jax.grad(loss))(params)

    expected = parameter_paths(gradients())
    for fields in ({"scan_layers": False, "remat": "dots"}, {"remat": "full"}):
        for path, gradient in parameter_paths(gradients(**fields)).items():
            np.testing.assert_allclose(gradient, expected[path], atol=2e-5, err_msg=f"{fields} {path}")


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_saves_the_selection_by_name(remat, capsys):
    model, params = built("gqa", remat=remat, n_layers=1, scan_layers=False)

    def loss(params):
        return model.apply({"params": params}, random_ids(), attention="sparse").logits.sum()

    jax.ad_checkpoint.print_saved_residuals(loss, params)
    saved = [line for line in capsys.readouterr().out.splitlines() if TOPK_NAME in line]
    assert len(saved) == 1 and saved[0].startswith(f"i32[2,{LENGTH},5]")


def test_each_loss_reaches_its_own_parameters_only():
    model, params = built("mla", moe=True)
    ids = random_ids()

    @jax.jit
    def gradients(params):
        def losses(params):
            out = model.apply({"params": params}, ids, attention="sparse", indexer_loss="sparse")
            return jax.nn.logsumexp(out.logits, axis=-1).mean() + 0.01 * out.moe.balance_loss.sum(), out.indexer_kl.sum()

        _, pull = jax.vjp(losses, params)
        return pull((jnp.float32(1), jnp.float32(0)))[0], pull((jnp.float32(0), jnp.float32(1)))[0]

    of_model, of_indexer = (parameter_paths(g) for g in gradients(params))
    for path in parameter_paths(params):
        touched = float(np.abs(of_model[path]).max()), float(np.abs(of_indexer[path]).max())
        if is_score_bias_path(path):
            assert touched == (0.0, 0.0), path
        elif is_indexer_path(path):
            assert touched[0] == 0.0 and touched[1] > 0.0, path
        else:
            assert touched[0] > 0.0 and touched[1] == 0.0, path


def test_a_sharing_layer_reuses_the_selection_before_it():
    model, params = built("gqa", layer_types=("full", "shared", "full"))
    assert sorted(params) == ["dense_layers_0", "dense_layers_1", "dense_layers_2", "embed", "final_norm"]
    assert "indexer" not in params["dense_layers_1"]["attention"]
    out = forward(model, params, random_ids(), attention="sparse", indexer_loss="sparse", everything=True)
    np.testing.assert_array_equal(out.topk_indices[1], out.topk_indices[0])
    assert np.any(np.asarray(out.topk_indices[2]) != np.asarray(out.topk_indices[0]))
    assert out.indexer_kl[1] == 0 and out.indexer_kl[0] > 0 and out.indexer_kl[2] > 0


def test_oracle_covers_most_and_window_selects_the_last_keys():
    model, params = built("mla_plain", n_layers=1)
    coverage = {}
    for attention in ("sparse", "window", "oracle"):
        out = forward(model, params, random_ids(), attention=attention, everything=True)
        coverage[attention] = float(out.coverage[0])
        if attention == "window":
            np.testing.assert_array_equal(out.topk_indices[0, 1, 2], [0, 1, 2, -1, -1])
            np.testing.assert_array_equal(out.topk_indices[0, 1, 20], [16, 17, 18, 19, 20])
    assert 0 < coverage["sparse"] < coverage["oracle"] < 1 and coverage["window"] < coverage["oracle"]


def test_blocks_are_compared_with_the_keys_that_the_indexer_ranks_highest():
    variant = (("coarse_block_size", 4), ("coarse_blocks", 1))
    model, params = built("mla_plain", layer_types=("full", "shared", "full"), variant=variant)
    found = {a: forward(model, params, random_ids(), attention=a, everything=True) for a in ("sparse", "coarse_to_fine")}
    assert found["sparse"].indexer_recall is None
    recall = np.asarray(found["coarse_to_fine"].indexer_recall)
    assert np.isnan(recall[1])
    # The first layer sees the same input under both, so its own selections can be compared.
    chosen, best = (found[a].topk_indices[0] for a in ("coarse_to_fine", "sparse"))
    share = [
        np.mean([len({*c[c >= 0].tolist()} & {*b[b >= 0].tolist()}) / (b >= 0).sum() for c, b in zip(x, y, strict=True)])
        for x, y in zip(np.asarray(chosen), np.asarray(best), strict=True)
    ]
    np.testing.assert_allclose(recall[0], np.mean(share), rtol=1e-5)
    assert 0.5 < recall[0] < 1 and 0 < recall[2] <= 1


def test_dense_loss_under_sparse_attention_measures_the_same_layer_as_dense():
    model, params = built("gqa", n_layers=1)
    dense = forward(model, params, random_ids(), attention="dense", indexer_loss="dense")
    sparse = forward(model, params, random_ids(), attention="sparse", indexer_loss="dense")
    np.testing.assert_allclose(sparse.indexer_kl, dense.indexer_kl, rtol=1e-5)
    assert dense.coverage is None and dense.topk_indices is None and dense.hidden is None


def test_unembed_of_the_hidden_state_is_the_logits():
    for tied in (True, False):
        model, params = built("gqa", tie_embeddings=tied, n_layers=1, logits_scale=0.25)
        out = forward(model, params, random_ids(), everything=True, attention="dense")
        logits = model.apply({"params": params}, out.hidden, method="unembed")
        np.testing.assert_allclose(logits, out.logits, atol=1e-5)
        assert logits.dtype == jnp.float32 and ("lm_head" in params) is not tied
        kernel = params["embed"]["embedding"].T if tied else params["lm_head"]["kernel"]
        np.testing.assert_allclose(logits, out.hidden @ kernel * 0.25, atol=1e-5)


def test_bfloat16_activations_and_parameters():
    model, params = built("mla", moe=True, dtype="bfloat16", param_dtype="bfloat16")
    paths = parameter_paths(params)
    kept_wide = {path for path, leaf in paths.items() if leaf.dtype == jnp.float32}
    assert kept_wide == {path for path in paths if "norm/" in path or "router/" in path}
    out = forward(model, params, random_ids(), attention="sparse", indexer_loss="sparse", everything=True)
    assert out.hidden.dtype == jnp.bfloat16 and out.logits.dtype == jnp.float32 and out.indexer_kl.dtype == jnp.float32
    assert np.isfinite(np.asarray(out.logits)).all() and np.isfinite(np.asarray(out.indexer_kl)).all()


def test_positions_shift_nothing_but_distances_do():
    model, params = built("gqa")
    ids = random_ids()
    place = jnp.broadcast_to(jnp.arange(LENGTH), ids.shape)
    run = jax.jit(lambda positions: model.apply({"params": params}, ids, positions=positions, attention="dense").logits)
    np.testing.assert_allclose(run(place + 100), run(place), atol=2e-4)
    assert float(jnp.abs(run(2 * place) - run(place)).max()) > 1e-2


@pytest.mark.parametrize("attention", ["dense", "sparse"])
@pytest.mark.parametrize(("kind", "moe"), [("gqa", False), ("mla", True)])
def test_no_gpu_may_round_float32_to_multiply_it(kind, moe, attention):
    model, params = built(kind, moe=moe)

    def loss(params):
        output = model.apply({"params": params}, random_ids(), attention=attention, indexer_loss=attention)
        return jax.nn.logsumexp(output.logits, axis=-1).mean() + output.indexer_kl.sum()

    text = jax.jit(jax.grad(loss)).lower(params).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) > 20 and all("HIGHEST" in line and "DEFAULT" not in line for line in products)


def test_a_token_outside_the_vocabulary_is_nan_and_not_another_token():
    model, params = built("gqa", n_layers=1)
    ids = random_ids().at[0, -1].set(VOCAB).at[1, -1].set(-1)
    logits = np.asarray(forward(model, params, ids, attention="dense").logits)
    assert np.isnan(logits[:, -1]).all()
    narrow = np.asarray(forward(model, params, ids.astype(jnp.int8), attention="dense").logits)
    np.testing.assert_array_equal(narrow, logits)
    assert np.isfinite(np.asarray(forward(model, params, random_ids(), attention="dense").logits)).all()


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("gqa", {"attention": "sprase"}, "attention is 'sprase'; expected one of dense, sparse, coarse_to_fine, window"),
        ("gqa", {"attention": ""}, "attention is ''; expected one of dense"),
        ("gqa", {"indexer_loss": "kl"}, "indexer_loss is 'kl'; expected None, 'dense' or 'sparse'"),
        ("gqa", {"attention": "dense", "indexer_loss": "sparse"}, "'dense', which selects no keys; expected indexer_loss"),
        ("gqa", {"attention": "dense", "return_topk_indices": True}, "return_topk_indices is True with attention 'dense'"),
        ("none", {"attention": "sparse"}, "the model has no indexer"),
        ("none", {"indexer_loss": "dense"}, "the model has no indexer"),
    ],
)
def test_impossible_requests_are_refused(kind, arguments, message):
    model, params = built(kind, n_layers=1)
    with pytest.raises(ValueError, match=message):
        model.apply({"params": params}, random_ids(), **arguments)


def test_padding_may_hold_tokens_outside_the_vocabulary():
    model, params = built(moe=True)
    segment_ids = jnp.asarray([[1] * 9 + [0] * 4 + [2] * 11])

    @jax.jit
    @jax.grad
    def gradient(params, ids):
        output = model.apply({"params": params}, ids, segment_ids=segment_ids, attention="sparse", indexer_loss="sparse")
        return output.indexer_kl.sum() + output.moe.balance_loss.sum() + output.logits[0, -1].sum()

    ids = random_ids(1)
    clean, padded = (gradient(params, jnp.where(segment_ids == 0, token, ids)) for token in (3, -100))
    for path, value in parameter_paths(clean).items():
        assert np.all(np.isfinite(value)), path
        np.testing.assert_array_equal(parameter_paths(padded)[path], value, err_msg=path)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("input_ids", np.zeros(LENGTH, np.int32), r"input_ids has shape \[24\]; expected \[B, T\]"),
        ("input_ids", np.zeros((2, LENGTH), np.float32), "input_ids has dtype float32; expected whole numbers"),
        ("input_ids", np.zeros((2, LENGTH), ">i4"), "input_ids has dtype >i4, in another byte order"),
        ("positions", np.zeros((1, LENGTH), np.int32), r"positions has shape \[1, 24\]; expected \[2, 24\]"),
        ("positions", np.zeros((2, LENGTH), np.float32), "positions has dtype float32"),
        ("segment_ids", np.ones((2, LENGTH - 1), np.int32), r"segment_ids has shape \[2, 23\]; expected \[2, 24\]"),
        ("segment_ids", np.ones((2, LENGTH), bool), "segment_ids has dtype bool"),
        ("segment_ids", np.full((2, LENGTH), 2**32 + 1), "segment_ids holds 4294967297; expected numbers that fit 32 bits"),
        ("input_ids", np.full((2, LENGTH), -(2**40)), "input_ids holds -1099511627776; expected numbers that fit 32 bits"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(name, array, message):
    model, params = built()
    with pytest.raises(ValueError, match=message):
        model.apply({"params": params}, **{"input_ids": random_ids(), name: array})


def test_a_list_in_place_of_an_array():
    with pytest.raises(ValueError, match=r"input_ids is a list; expected an array\. Make it one"):
        check_inputs([[1, 2]], None, None)


@pytest.mark.parametrize(
    ("shape", "n_new", "message"),
    [
        ((2, 3), [1, 4], r"n_new is \[1, 4\]; expected numbers from 0 to 3, the length of input_ids"),
        ((2, 3), [1], r"n_new has shape \[1\]; expected \[2\]"),
        ((1, 3), [1, 1], "input_ids has 1 rows; expected 2, as many as the cache"),
    ],
)
def test_new_tokens_that_do_not_fit_the_cache(shape, n_new, message):
    with pytest.raises(ValueError, match=message):
        check_new_tokens(np.zeros(shape, np.int32), np.asarray(n_new), n_rows=2)


def test_parameters_of_another_depth_are_refused():
    _, params = built("gqa")
    with pytest.raises(ValueError, match="dense_layers has 2 layers in the parameters; expected 3"):
        build_model(small_config("gqa", n_layers=3)).apply({"params": params}, random_ids())


def test_first_parameters_follow_the_key_and_the_config():
    model = build_model(small_config("mla", moe=True, n_layers=4, initializer_range=0.1))
    first, again, other = (parameter_paths(init_params(model, jax.random.key(seed))) for seed in (0, 0, 1))
    for path, leaf in first.items():
        np.testing.assert_array_equal(leaf, again[path])
        if path.endswith("scale"):
            assert np.all(np.asarray(leaf) == 1), path
        elif path.endswith("bias"):
            assert np.all(np.asarray(leaf) == 0), path
        else:
            assert np.any(np.asarray(leaf) != np.asarray(other[path])), path
            onto_residual = path.endswith(("wo/kernel", "down/kernel"))
            expected = 1.0 if path == "embed/embedding" else 0.1 * (8**-0.5 if onto_residual else 1.0)
            np.testing.assert_allclose(np.std(leaf), expected, rtol=0.15, err_msg=path)
            if "layers" in path and len(leaf) > 1:
                assert np.any(np.asarray(leaf[0]) != np.asarray(leaf[1])), path


def test_equal_configs_give_equal_models():
    first, second = build_model(small_config("mla", moe=True)), build_model(small_config("mla", moe=True))
    assert first == second and hash(first) == hash(second)
    assert first != build_model(small_config("mla", moe=True, topk=6))
