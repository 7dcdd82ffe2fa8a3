"""Checkpoints written by transformers compute here what they compute there: logits, greedy text, selected keys."""

import functools
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax import generate, load_pretrained
from dsa_jax.checkpoints.pretrained import Pretrained
from dsa_jax.model import ModelOutput
from tests.fixtures.hf_cases import CASES, NEW_TOKENS, PROMPT_LENGTH

FIXTURES = Path(__file__).parents[3] / "fixtures" / "hf"
# Both sides compute in float32 and add in different orders; a wrong eps, scale or layout is off by far more.
LOGITS_TOLERANCE = 1e-4
MAX_BYTES = 400_000
WITH_INDEXER = [name for name, case in CASES.items() if case.topk]


class Parity(NamedTuple):
    loaded: Pretrained
    expected: dict[str, np.ndarray]
    text: np.ndarray
    output: ModelOutput


@functools.cache
def parity(name):
    """The fixture, and our output over the prompt with its continuation, in the mode that the checkpoint stands for."""
    loaded = load_pretrained(FIXTURES / name, dtype="float32")
    with np.load(FIXTURES / name / "expected.npz") as arrays:
        expected = dict(arrays)
    text = np.concatenate([expected["input_ids"], expected["continuation"]], axis=1)
    return Parity(loaded, expected, text, forward(loaded, text, return_topk_indices=bool(CASES[name].topk)))


def forward(loaded, text, **options):
    apply = jax.jit(functools.partial(loaded.model.apply, **options))
    return apply({"params": loaded.params}, jnp.asarray(text))


@pytest.mark.parametrize("name", CASES)
def test_logits(name):
    case = parity(name)
    np.testing.assert_allclose(case.output.logits, case.expected["logits"], atol=LOGITS_TOLERANCE, rtol=0)
    assert case.expected["logits"].std() > 0.5


@pytest.mark.parametrize("name", CASES)
def test_greedy_continuation(name):
    """Teacher-forced: each token of the continuation is the best one after what transformers wrote before it."""
    case = parity(name)
    deciding = case.output.logits[:, PROMPT_LENGTH - 1 : -1]
    assert case.expected["continuation"].shape == (2, NEW_TOKENS)
    np.testing.assert_array_equal(jnp.argmax(deciding, axis=-1), case.expected["continuation"])


@pytest.mark.parametrize("name", ["qwen3", "deepseek_v32", "glm_moe_dsa_shared"])
def test_decoding_with_a_cache_writes_what_transformers_writes(name):
    case = parity(name)
    written = generate(case.loaded, case.expected["input_ids"].tolist(), max_new_tokens=NEW_TOKENS)
    assert written.token_ids == case.expected["continuation"].tolist()


@pytest.mark.parametrize("name", WITH_INDEXER)
def test_selected_keys(name):
    case = parity(name)
    np.testing.assert_array_equal(case.output.topk_indices, case.expected["topk_indices"])
    assert case.text.shape[1] > 4 * CASES[name].topk


@pytest.mark.parametrize("name", ["deepseek_v32", "glm_moe_dsa_shared"])
def test_a_checkpoint_with_an_indexer_runs_sparse_and_dense_attention_is_something_else(name):
    case = parity(name)
    topk = CASES[name].topk
    dense = forward(case.loaded, case.text, attention="dense").logits
    # Queries that see no more than topk keys select them all.
    np.testing.assert_allclose(dense[:, :topk], case.expected["logits"][:, :topk], atol=LOGITS_TOLERANCE, rtol=0)
    assert np.all(np.abs(dense[:, topk:] - case.expected["logits"][:, topk:]).max(axis=-1) > 100 * LOGITS_TOLERANCE)


def test_both_spellings_of_the_config_are_the_same_model(tmp_path):
    case = parity("deepseek_v32")
    shutil.copy(FIXTURES / "deepseek_v32" / "config_hub.json", tmp_path / "config.json")
    shutil.copy(FIXTURES / "deepseek_v32" / "model.safetensors", tmp_path)
    hub = load_pretrained(tmp_path, dtype="float32")
    assert hub.config == case.loaded.config
    jax.tree.map(np.testing.assert_array_equal, hub.params, case.loaded.params)


def test_layers_that_share_a_selection_have_no_indexer_of_their_own():
    case = parity("glm_moe_dsa_shared")
    selected = np.asarray(case.output.topk_indices)
    assert case.loaded.config.attention.layer_types == ("full", "shared", "full", "shared")
    np.testing.assert_array_equal(selected[0], selected[1])
    np.testing.assert_array_equal(selected[2], selected[3])
    assert np.any(selected[0] != selected[2])


@pytest.mark.parametrize("name", CASES)
def test_a_fixture_is_small(name):
    assert sum(path.stat().st_size for path in (FIXTURES / name).iterdir()) < MAX_BYTES
