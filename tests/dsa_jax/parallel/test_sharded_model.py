"""Eight devices compute what one does, in all three stages, and none of them holds or fetches what is too large.

Both stages with dense attention are one program here: pretraining's loss reaches everything but the indexer, warm-up's KL
reaches the indexer alone, so the gradients of their sum are those of both. Compiling takes the time, so every layout sees each
stage once and both models once, paired by turns.
"""

import functools
import importlib
import itertools
import re

import jax
import numpy as np
import pytest

from dsa_jax.data import Batch
from dsa_jax.model import build_model
from dsa_jax.parallel.placement import place, place_batch
from dsa_jax.params import is_indexer_path, parameter_paths
from dsa_jax.train.loss import forward_with_loss
from tests.dsa_jax.model.small import drawn
from tests.dsa_jax.parallel.meshes import N_LAYERS, PRESETS, VOCAB, eight_way_config, mesh

BATCH, LENGTH = 8, 144
KINDS = {"mla_moe": ("mla", True), "gqa_moe": ("gqa", True), "gqa": ("gqa", False)}
STAGES = {
    "pretrain": {"attention": "dense"},
    "pretrain+warmup": {"attention": "dense", "indexer_loss": "dense"},
    "sparse": {"attention": "sparse", "indexer_loss": "sparse", "return_topk_indices": True},
}


LIMITS = {
    "pallas_kernels.dense_attention.xla": ("LOGIT_BUDGET", 1),
    "pallas_kernels.indexer_loss.xla_visible": ("LOGIT_BUDGET", 1),
    "pallas_kernels.index_topk.xla": ("SCORE_BUDGET", 1),
    "dsa_jax.train.loss": ("LOGITS_PER_CHUNK", 2**14),
}
"""So low that even what one device has of these short rows is several chunks: then a whole row of anything stands out."""


@pytest.fixture(autouse=True, scope="module")
def short_chunks():
    with pytest.MonkeyPatch.context() as patch:
        for module, (name, value) in LIMITS.items():
            patch.setattr(importlib.import_module(module), name, value)
        yield


@pytest.fixture(autouse=True)
def forget_programs():
    """Dozens of large programs kept in one process are more than XLA for CPU bears."""
    yield
    jax.clear_caches()


@functools.partial(jax.jit, static_argnums=(0, 1))
def everything(model, stage, params, batch):
    """((nll, KL, selection, statistics of the experts), gradients by path) of one batch."""

    def loss(params):
        output, per_token = forward_with_loss(model, params, batch, **STAGES[stage])
        nll = per_token.nll.mean()
        kl = 0.0 if output.indexer_kl is None else output.indexer_kl.sum()
        balance = 0.0 if output.moe is None else output.moe.balance_loss.sum()
        return nll + kl + 0.01 * balance, (nll, output.indexer_kl, output.topk_indices, output.moe)

    (_, results), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return results, parameter_paths(gradients)


def packed_batch():
    rng = np.random.default_rng(1)
    ids = rng.integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)
    segments = np.ones((BATCH, LENGTH), np.int32)
    segments[1, 50:] = 2
    segments[2, 100:] = 0
    segments[3] = 0
    return Batch(ids, np.roll(ids, -1, axis=1), segments != 0, segments)


@functools.cache
def built(kind):
    attention, moe = KINDS[kind]
    model = build_model(eight_way_config(attention, moe=moe))
    return model, drawn(model)


@functools.cache
def alone(kind, stage):
    model, params = built(kind)
    return jax.device_get(everything(model, stage, params, packed_batch()))


def layouts():
    """(preset, kind, stage) to test; the model with GQA has experts where these are split."""
    for i, preset in enumerate(PRESETS):
        gqa = "gqa_moe" if "ep" in preset else "gqa"
        stages = ("pretrain+warmup", "sparse")
        for kind, stage in zip(("mla_moe", gqa), stages if i % 2 else stages[::-1], strict=True):
            yield preset, kind, stage


@pytest.mark.parametrize(("preset", "kind", "stage"), list(layouts()))
def test_eight_devices_compute_what_one_does(preset, kind, stage):
    model, params = built(kind)
    with jax.set_mesh(mesh(preset)):
        arguments = place(params), place_batch(packed_batch())
        program = everything.lower(model, stage, *arguments).compile()
        found = jax.device_get(program(*arguments))
    assert_close(found, alone(kind, stage))
    assert_nothing_large(program.as_text(), mesh(preset).shape)


def assert_close(found, expected):
    """Losses, KL and gradients to 1e-5; selections and the load of the experts exactly."""
    for a, b in zip(jax.tree.leaves(found[0]), jax.tree.leaves(expected[0]), strict=True):
        if b.dtype == np.int32:
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    if expected[0][3] is not None:
        np.testing.assert_array_equal(found[0][3].expert_counts, expected[0][3].expert_counts)
    for path, gradient in expected[1].items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(found[1][path], gradient, rtol=1e-5, atol=1e-5 * scale + 1e-12, err_msg=path)


def assert_nothing_large(program, sizes):
    """No logits of whole rows, no scores of all queries, and no parameter gathered for all layers at once."""
    lines = [line for line in program.splitlines() if " = " in line]
    queries = LENGTH // sizes["context"]
    forbidden = {(queries, LENGTH), (queries, VOCAB), (queries, VOCAB // sizes["tensor"])}
    for line in lines:
        for shape in shapes(line.split(" = ")[1].split("(")[0]):
            assert not forbidden.intersection(itertools.permutations(shape, 2)), line
    for line in lines:
        if re.search(r" (all-gather|all-to-all|collective-permute)(-start)?\(", line):
            assert not [shape for shape in shapes(line) if shape[:1] == (N_LAYERS,) and len(shape) > 2], line


def shapes(text):
    return [tuple(int(n) for n in dims.split(",") if n) for dims in re.findall(r"\b\w+\[([\d,]*)\]", text)]


def test_the_gradients_of_both_dense_stages_are_those_of_pretraining_and_of_the_indexer():
    (nll, *_), gradients = alone("gqa", "pretrain")
    (both_nll, *_), both = alone("gqa", "pretrain+warmup")
    np.testing.assert_allclose(both_nll, nll, rtol=1e-6)
    for path, gradient in gradients.items():
        if is_indexer_path(path):
            assert not gradient.any() and both[path].any(), path
        else:
            np.testing.assert_allclose(both[path], gradient, rtol=1e-6, atol=1e-9, err_msg=path)
