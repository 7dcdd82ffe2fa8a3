"""One optimizer update of a stage, as a pure jitted function of (state, batch)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dsa_jax.config import Config, StageConfig
from dsa_jax.data import Batch
from dsa_jax.model import Transformer, updated_score_bias
from dsa_jax.parallel.placement import hold, replicate
from dsa_jax.params import (
    is_indexer_path,
    is_score_bias_path,
    merge_parameters,
    nested_parameters,
    parameter_paths,
    split_parameters,
)
from dsa_jax.train.loss import forward_with_loss, forward_without_head
from dsa_jax.train.optimizer import learning_rates, make_optimizer
from dsa_jax.train.stages import Stage

Params = dict[str, Any]


class TrainState(NamedTuple):
    """State of a stage between steps; all of it is checkpointed.

    `step` counts batches, `skipped` the updates dropped because they were not finite, `skipped_in_a_row` the current run of
    them. The optimizer holds state for the trainable parameters only.
    """

    params: Params
    opt_state: Any
    step: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array


class _Totals(NamedTuple):
    """Denominators of a whole batch: micro-batches sum to it, however their padding differs."""

    targets: jax.Array
    queries: jax.Array
    rows: jax.Array


def init_state(params: Params, stage: Stage, config: StageConfig) -> TrainState:
    """A state at step 0 with fresh optimizer state."""
    trainable, _ = split_parameters(params, stage.trains)
    counters = (jnp.zeros((), jnp.int32) for _ in range(3))  # one buffer each, since the step donates them
    return TrainState(params, make_optimizer(config.optimizer, config.n_steps).init(trainable), *counters)


def _totals(batch: Batch) -> _Totals:
    count = lambda x: jnp.maximum(x.sum(), 1).astype(jnp.float32)
    valid = batch.segment_ids > 0
    return _Totals(count(batch.target_mask), count(valid), count(valid.any(axis=-1)))


def make_train_step(model: Transformer, stage: Stage, config: Config) -> Callable[[TrainState, Batch], tuple[TrainState, Any]]:
    """Build `(state, batch) -> (state, metrics)`; the state is donated.

    Losses are means over the valid positions of the whole batch: the LM loss over its targets, the KL over its queries (then
    summed over layers). Each micro-batch contributes sums divided by the whole batch's counts, so accumulating over
    micro-batches computes the large batch's gradient. An update that is not finite changes neither parameters nor optimizer.

    Metrics (scalars, float32): `loss` and `accuracy` where the stage has an LM loss, `kl` (summed over layers)
    and `kl_layers` where the indexer learns, `balance_loss` and `expert_load_max` (largest share of a layer's tokens times
    the number of experts) for MoE models, `grad_norm` of all that learns, `grad_norm_base` and `grad_norm_indexer` of its two
    parts and their `learning_rate_base` and `learning_rate_indexer` in this update, for the parts that learn, `is_finite`,
    `skipped`, `skipped_in_a_row`.

    Raises:
        ConfigError: for a model whose weights are kept in fp8.
    """
    config.model.check_trainable()
    stage_config: StageConfig = getattr(config.laid_out().train, stage.name)
    optimizer = make_optimizer(stage_config.optimizer, stage_config.n_steps)
    rates = learning_rates(stage_config.optimizer, stage_config.n_steps)
    moe = config.model.moe

    def loss_fn(trainable: Params, frozen: Params, batch: Batch, totals: _Totals) -> tuple[jax.Array, dict[str, jax.Array]]:
        params = merge_parameters(trainable, frozen)
        request = {"attention": stage.attention, "indexer_loss": stage.indexer_loss}
        total = jnp.zeros((), jnp.float32)
        sums: dict[str, jax.Array] = {}
        if stage.has_lm_loss:
            output, per_token = forward_with_loss(model, params, batch, **request)
            sums["loss"] = per_token.nll.sum() / totals.targets
            sums["accuracy"] = per_token.correct.sum() / totals.targets
            total += sums["loss"]
        else:
            output = forward_without_head(model, params, batch, **request)
        if stage.indexer_loss is not None:
            assert output.indexer_kl is not None
            share = (batch.segment_ids > 0).sum() / totals.queries
            sums["kl_layers"] = output.indexer_kl * share
            total += stage_config.indexer_loss_weight * sums["kl_layers"].sum()
        if output.moe is not None and stage.has_lm_loss:
            share = (batch.segment_ids > 0).any(axis=-1).sum() / totals.rows
            sums["balance_loss"] = output.moe.balance_loss.sum() * share
            sums["expert_counts"] = output.moe.expert_counts.astype(jnp.float32)
            total += moe.balance_loss_weight * sums["balance_loss"]
        return total, sums

    def gradients(params: Params, batch: Batch) -> tuple[Params, dict[str, jax.Array]]:
        trainable, frozen = split_parameters(params, stage.trains)
        totals = _totals(batch)
        grad_fn = jax.grad(loss_fn, has_aux=True)
        if stage_config.accumulation == 1:
            return grad_fn(trainable, frozen, batch, totals)
        # Every n-th row, so that each micro-batch is sharded over the same devices as the batch.
        micro = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, stage_config.accumulation, *x.shape[1:]), 1, 0), batch)

        def add(carry: Any, part: Batch) -> tuple[Any, None]:
            return jax.tree.map(lambda c, g: c + g.astype(c.dtype), carry, grad_fn(trainable, frozen, part, totals)), None

        shapes = jax.eval_shape(grad_fn, trainable, frozen, jax.tree.map(lambda x: x[0], micro), totals)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, jnp.float32)), shapes)
        (grads, sums), _ = jax.lax.scan(add, zeros, micro)
        return jax.tree.map(lambda g, p: g.astype(p.dtype), grads, trainable), sums

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        grads, metrics = gradients(state.params, batch)
        grad_norm = optax.tree.norm(grads)
        is_finite = jnp.isfinite(grad_norm)
        for name in ("loss", "kl_layers"):
            if name in metrics:
                is_finite &= jnp.isfinite(metrics[name]).all()
        trainable, frozen = split_parameters(state.params, stage.trains)
        updates, opt_state = optimizer.update(grads, state.opt_state, trainable)
        for update in jax.tree.leaves(updates):
            is_finite &= jnp.isfinite(update).all()
        counts = metrics.pop("expert_counts", None)
        if counts is not None:
            frozen = move_score_biases(frozen, counts, moe.bias_update_rate)
            metrics["expert_load_max"] = (counts / jnp.maximum(counts.sum(-1, keepdims=True), 1)).max() * moe.n_routed_experts
        new = (merge_parameters(optax.apply_updates(trainable, updates), frozen), opt_state)
        old = (state.params, state.opt_state)
        params, opt_state = jax.tree.map(lambda n, o: jnp.where(is_finite, n, o), new, old)
        skipped = state.skipped + jnp.where(is_finite, 0, 1)
        in_a_row = jnp.where(is_finite, 0, state.skipped_in_a_row + 1)
        if "kl_layers" in metrics:
            metrics["kl"] = metrics["kl_layers"].sum()
        n_updates = state.step - state.skipped
        for name, part in zip(("indexer", "base"), split_parameters(grads, is_indexer_path), strict=True):
            if part:
                metrics[f"grad_norm_{name}"] = optax.tree.norm(part)
                metrics[f"learning_rate_{name}"] = jnp.asarray(rates[name](n_updates), jnp.float32)
        metrics |= {"grad_norm": grad_norm, "is_finite": is_finite, "skipped": skipped, "skipped_in_a_row": in_a_row}
        return hold(TrainState(params, opt_state, state.step + 1, skipped, in_a_row)), replicate(metrics)

    return jax.jit(train_step, donate_argnums=0)


def move_score_biases(params: Params, counts: jax.Array, rate: float) -> Params:
    """Move every router's selection bias by its layer's load.

    Args:
        params: nested parameters; biases are stacked per run of MoE layers, in layer order.
        counts: tokens per expert, [n_moe_layers, n_experts], in layer order.
        rate: step of the bias, gamma in arXiv 2412.19437 section 2.1.2.
    """
    flat = parameter_paths(params)
    paths = [path for path in flat if is_score_bias_path(path)]
    first = 0
    for path in sorted(paths, key=_first_layer):
        n_layers = flat[path].shape[0]
        flat[path] = updated_score_bias(flat[path], counts[first : first + n_layers], rate)
        first += n_layers
    return nested_parameters(flat)


def _first_layer(path: str) -> int:
    suffix = path.split("/", 1)[0].rsplit("_", 1)[-1]
    return int(suffix) if suffix.isdigit() else 0
