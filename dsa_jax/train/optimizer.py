"""Optimizers and learning-rate schedules of a stage."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dsa_jax.config import OptimizerConfig
from dsa_jax.params import is_indexer_path, nested_parameters, parameter_paths

MATRICES = ("kernel", "embedding")


def learning_rate_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Learning rate by 0-based update: linear warm-up, then `config.schedule` to `final_fraction` of it at `total_steps`.

    The last update, number `total_steps` - 1, is one step short of it.
    """
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    decay_steps = max(total_steps - config.warmup_steps, 1)
    body = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, final, decay_steps),
        "cosine": lambda: optax.cosine_decay_schedule(peak, decay_steps, alpha=config.final_fraction),
    }[config.schedule]()
    if not config.warmup_steps:
        return body
    ramp = optax.linear_schedule(peak / config.warmup_steps, peak, max(config.warmup_steps - 1, 1))
    return optax.join_schedules([ramp, body], [config.warmup_steps])


def learning_rates(config: OptimizerConfig, total_steps: int) -> dict[str, optax.Schedule]:
    """The schedules of the `base` and of the `indexer` by 0-based update; equal without `indexer_learning_rate`."""
    of_indexers = dataclasses.replace(config, learning_rate=config.indexer_learning_rate or config.learning_rate)
    return {"base": learning_rate_schedule(config, total_steps), "indexer": learning_rate_schedule(of_indexers, total_steps)}


def _by_path(tree: Any, rule: Any) -> Any:
    return nested_parameters({path: rule(path, leaf) for path, leaf in parameter_paths(tree).items()})


def _is_matrix(path: str) -> bool:
    return path.rsplit("/", 1)[-1] in MATRICES


def _muon_dimensions(path: str, leaf: jax.Array | optax.MaskedNode) -> optax.contrib.MuonDimensionNumbers | None:
    """Hidden matrices `[..., in, out]` are orthogonalised, one by one where they are stacked; embedding and head are not."""
    if isinstance(leaf, optax.MaskedNode):  # optax calls again with the leaves of AdamW masked
        return None
    hidden = path.endswith("/kernel") and not path.startswith("lm_head/")
    return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1) if hidden else None


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """Build the gradient transformation of a stage for a nested parameter dict.

    Weight decay acts on matrices only. Muon (`optax.contrib.muon`, RMS matched to AdamW as in arXiv 2502.16982) orthogonalises
    hidden matrices and leaves the embedding, the head, norms and biases to AdamW. Moments and
    updates are float32 at least. With `indexer_learning_rate` the indexers are updated, and their gradient norm is clipped,
    apart from the rest: Adam divides out any weight on their loss, and one bound on both norms would let either stop the
    other.
    """
    if not config.indexer_learning_rate:
        return _update(config, total_steps)
    of_indexers = dataclasses.replace(
        config, learning_rate=config.indexer_learning_rate, weight_decay=config.indexer_weight_decay
    )
    groups = {"model": _update(config, total_steps), "indexer": _update(of_indexers, total_steps)}
    label = lambda path, _: "indexer" if is_indexer_path(path) else "model"
    return optax.partition(groups, lambda params: _by_path(params, label))


def _update(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """Clipping and the optimizer of one group of parameters."""
    schedule = learning_rate_schedule(config, total_steps)
    decay_mask = lambda params: _by_path(params, lambda path, _: _is_matrix(path))
    update = optax.adamw(
        schedule, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=decay_mask
    )
    if config.name == "muon":
        hidden = optax.contrib.muon(
            schedule,
            beta=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=lambda params: _by_path(params, _muon_dimensions),
            consistent_rms=0.2,
        )
        # Not Muon's own branch for the rest, which decays biases or nothing and uses Nesterov momentum.
        label = lambda path, leaf: "adamw" if _muon_dimensions(path, leaf) is None else "muon"
        update = optax.partition({"muon": hidden, "adamw": update}, lambda params: _by_path(params, label))
    if config.clip_norm:
        update = optax.chain(optax.clip_by_global_norm(config.clip_norm), update)
    return in_float32(update)


def in_float32(update: optax.GradientTransformation) -> optax.GradientTransformation:
    """`update` with its state, its arithmetic and its result in float32, whatever narrower dtype the parameters have.

    A moment that decays by 0.999 moves by a thousandth of itself per step, which bfloat16, with 8 bits, rounds away: it stops
    at a fraction of what it should become. Parameters and gradients in float32 are passed on as they are.
    """
    widen = lambda tree: jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)

    def step(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return update.update(widen(grads), state, None if params is None else widen(params))

    return optax.GradientTransformation(lambda params: update.init(widen(params)), step)
