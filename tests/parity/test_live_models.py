"""Fresh random models of every family: what transformers computes, we compute."""

import numpy as np
import pytest
import torch

from dsa_jax import load_pretrained
from tests.fixtures.hf_cases import CASES
from tests.fixtures.hf_models import expected, random_model, random_prompt
from tests.fixtures.make_hf_fixtures import is_robust
from tests.parity.both import LOGITS_TOLERANCE, run_ours, run_transformers

FIRST_SEED = 20_000  # beyond those that the fixtures may come from
FAMILIES = [
    "llama",
    "qwen3",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v2_lite",
    "deepseek_v3",
    "deepseek_v32",
    "glm_moe_dsa_shared",
    "glm4_moe_lite",
]


def clear_case(name):
    """The first model and prompt whose selections and tokens do not hang on rounding."""
    for seed in range(FIRST_SEED, FIRST_SEED + 500):
        model = random_model(name, seed)
        result = expected(model, random_prompt(seed))
        if is_robust(result):
            return model, result
    raise AssertionError(f"{name}: none of 500 seeds gives a clear case.")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_fresh_model(name, tmp_path):
    model, theirs = clear_case(name)
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path)
    text = np.concatenate([theirs.input_ids, theirs.continuation], axis=1)
    ours = run_ours(loaded, text, return_topk_indices=bool(CASES[name].topk))
    np.testing.assert_allclose(ours.logits, theirs.logits, atol=LOGITS_TOLERANCE, rtol=0)
    start = theirs.input_ids.shape[1]
    np.testing.assert_array_equal(np.argmax(ours.logits[:, start - 1 : -1], axis=-1), theirs.continuation)
    if CASES[name].topk:
        np.testing.assert_array_equal(ours.topk_indices, theirs.topk_indices)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v32"])
def test_a_bfloat16_checkpoint(name, tmp_path):
    """Stored in bfloat16 and computed in float32 on both sides: as exact as a float32 checkpoint."""
    text = random_prompt(0).numpy().astype(np.int32)
    for seed in range(FIRST_SEED, FIRST_SEED + 500):
        random_model(name, seed).to(torch.bfloat16).save_pretrained(tmp_path)
        theirs = run_transformers(tmp_path, text)
        if theirs.margin > 5e-4:
            break
    ours = run_ours(load_pretrained(tmp_path, dtype="float32"), text)
    np.testing.assert_allclose(ours.logits, theirs.logits, atol=LOGITS_TOLERANCE, rtol=0)

    stored = load_pretrained(tmp_path)
    assert stored.config.param_dtype == stored.config.dtype == "bfloat16"
    assert stored.params["embed"]["embedding"].dtype == "bfloat16"
    low = run_ours(stored, text).logits
    # Single picks and experts flip at this precision, so only the bulk is compared.
    assert np.median(np.abs(low - theirs.logits)) < 0.1 * theirs.logits.std()
