"""Checkpoints written here load in transformers, whole, and compute the same."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dsa_jax import load_pretrained, save_pretrained
from dsa_jax.config import IndexerConfig
from tests.fixtures.hf_cases import CASES, TOPK
from tests.fixtures.hf_models import random_prompt
from tests.parity.both import CLEAR_MARGIN, LOGITS_TOLERANCE, run_ours, run_transformers, trained

FIXTURES = Path(__file__).parents[1] / "fixtures" / "hf"
TEXT = random_prompt(7).numpy().astype(np.int32)


def exported(name, directory, *, indexer=None, layer_types=(), attention=None):
    """A fixture, retrofitted if asked, trained for a while and written out; with what transformers makes of it.

    Seeds are tried until no selection hangs on rounding.
    """
    for seed in range(100):
        options = {"indexer": indexer, "layer_types": layer_types, "attention": attention, "seed": seed}
        loaded = load_pretrained(FIXTURES / name, dtype="float32", **options)
        loaded = loaded._replace(params=trained(loaded.params, seed))
        save_pretrained(directory, loaded.config, loaded.params)
        theirs = run_transformers(directory, TEXT)
        if theirs.margin > CLEAR_MARGIN:
            return loaded, theirs
    raise AssertionError(f"{name}: none of 100 seeds gives clear selections.")


def model_type(directory):
    return json.loads((directory / "config.json").read_text(encoding="utf-8"))["model_type"]


@pytest.mark.parametrize("name", CASES)
def test_every_family_goes_back_as_it_came(name, tmp_path):
    loaded, theirs = exported(name, tmp_path)
    assert model_type(tmp_path) == CASES[name].model_type
    assert not theirs.missing and not theirs.unexpected
    has_indexer = bool(CASES[name].topk)
    ours = run_ours(loaded, TEXT, return_topk_indices=has_indexer)
    np.testing.assert_allclose(ours.logits, theirs.logits, atol=LOGITS_TOLERANCE, rtol=0)
    if has_indexer:
        np.testing.assert_array_equal(ours.topk_indices, theirs.topk_indices)


def new_indexer(rope_dim):
    return IndexerConfig(enabled=True, n_heads=8, head_dim=16, rope_dim=rope_dim, topk=TOPK)


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe_lite"])
def test_a_retrofitted_latent_model_becomes_a_deepseek_v32_checkpoint(name, tmp_path):
    loaded, theirs = exported(name, tmp_path, indexer=new_indexer(8), attention="sparse")
    assert model_type(tmp_path) == "deepseek_v32"
    assert not theirs.missing and not theirs.unexpected
    ours = run_ours(loaded, TEXT, return_topk_indices=True)
    np.testing.assert_array_equal(ours.topk_indices, theirs.topk_indices)
    np.testing.assert_allclose(ours.logits, theirs.logits, atol=LOGITS_TOLERANCE, rtol=0)


def test_a_retrofitted_latent_model_that_shares_selections_becomes_a_glm_checkpoint(tmp_path):
    n_layers = load_pretrained(FIXTURES / "deepseek_v3").config.n_layers
    indexer, layer_types = new_indexer(8), ("full",) * (n_layers - 1) + ("shared",)
    loaded, theirs = exported("deepseek_v3", tmp_path, indexer=indexer, layer_types=layer_types, attention="sparse")
    assert indexer.rope_layout == "half_split" and model_type(tmp_path) == "glm_moe_dsa"
    assert not theirs.missing and not theirs.unexpected
    ours = run_ours(loaded, TEXT, return_topk_indices=True)
    np.testing.assert_array_equal(ours.topk_indices, theirs.topk_indices)
    np.testing.assert_allclose(ours.logits, theirs.logits, atol=LOGITS_TOLERANCE, rtol=0)


@pytest.mark.parametrize(("name", "rope_dim"), [("qwen3", 16), ("deepseek_v2", 8)])
def test_where_no_family_has_an_indexer_transformers_runs_the_dense_model(name, rope_dim, tmp_path):
    loaded, theirs = exported(name, tmp_path, indexer=new_indexer(rope_dim), attention="sparse")
    assert model_type(tmp_path) == CASES[name].model_type
    assert not theirs.missing
    assert theirs.unexpected and all(".self_attn.indexer." in tensor for tensor in theirs.unexpected)
    dense = run_ours(loaded, TEXT, attention="dense")
    np.testing.assert_allclose(dense.logits, theirs.logits, atol=LOGITS_TOLERANCE, rtol=0)


def test_a_bfloat16_export_holds_the_same_weights_in_transformers(tmp_path):
    loaded = load_pretrained(FIXTURES / "deepseek_v32", dtype="bfloat16")
    save_pretrained(tmp_path, loaded.config, loaded.params)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert model.dtype == torch.bfloat16 and not report["missing_keys"] and not report["unexpected_keys"]
    original = AutoModelForCausalLM.from_pretrained(FIXTURES / "deepseek_v32", dtype=torch.float32).state_dict()
    for name, tensor in model.state_dict().items():
        stored = original[name].bfloat16() if tensor.dtype == torch.bfloat16 else original[name]
        torch.testing.assert_close(tensor, stored, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")
