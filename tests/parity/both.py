"""One checkpoint directory run by transformers and by this project."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from dsa_jax.params import nested_parameters, parameter_paths
from tests.fixtures.hf_models import recorded_selection

LOGITS_TOLERANCE = 1e-4  # float32 on both sides
CLEAR_MARGIN = 1e-4  # between the index scores of a selected and of a rejected key; rounding moves them by about 1e-6


class Theirs(NamedTuple):
    """What transformers computes from a directory, and what it missed there or did not know."""

    logits: np.ndarray
    topk_indices: np.ndarray | None
    margin: float
    missing: set[str]
    unexpected: set[str]


def run_transformers(directory: Path, input_ids: np.ndarray) -> Theirs:
    """Load with transformers in float32 and run one forward pass."""
    model, report = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["mismatched_keys"] and not report["error_msgs"]
    with torch.no_grad(), recorded_selection(model.eval()) as selection:
        logits = model(torch.from_numpy(input_ids).long(), use_cache=False).logits.numpy()
    selected = np.stack(selection.per_layer) if selection.per_layer else None
    return Theirs(logits, selected, selection.margin, set(report["missing_keys"]), set(report["unexpected_keys"]))


def run_ours(loaded: Any, input_ids: np.ndarray, **options: Any) -> Any:
    """One jitted forward pass."""
    apply = jax.jit(functools.partial(loaded.model.apply, **options))
    return apply({"params": loaded.params}, jnp.asarray(input_ids))


def trained(params: dict[str, Any], seed: int) -> dict[str, Any]:
    """Parameters as training might leave them: all moved a little, those of an indexer (which start tiny) a lot."""
    rng = np.random.default_rng(seed)

    def moved(path: str, leaf: jax.Array) -> jax.Array:
        noise = jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype)
        if "/indexer/" in path:
            return leaf + noise * (0.3 if leaf.ndim > 2 else 0.1)
        return leaf * (1 + 0.1 * noise)

    return nested_parameters({path: moved(path, leaf) for path, leaf in parameter_paths(params).items()})
