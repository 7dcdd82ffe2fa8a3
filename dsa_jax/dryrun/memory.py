"""Bytes per device: of parameters and optimizer state under the sharding rules, and an estimate of a step's activations.

`jax.vjp` of one layer returns a function whose leaves are exactly what that layer keeps for its backward pass, so tracing it
counts bytes without running anything. Under the recipe's rematerialisation those are the residuals that every layer keeps from
the forward to the backward pass; without any, the memory of one layer during its backward pass. What a frozen layer computes
and drops on the way is not counted. `experiments/results/dry_run.md` compares the estimate with the compiler's memory.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from dsa_jax.config import Config
from dsa_jax.config.attention import SHARED
from dsa_jax.model import Transformer
from dsa_jax.model.outputs import AttentionRequest, LayerContext
from dsa_jax.model.transformer import BlockStack, rematerialised
from dsa_jax.parallel.placement import specs_of
from dsa_jax.parallel.rules import parameter_spec
from dsa_jax.params import merge_parameters, nested_parameters, parameter_paths, split_parameters
from dsa_jax.train.loss import LOGITS_PER_CHUNK
from dsa_jax.train.stages import Stage
from pallas_kernels import Visible


def shard_bytes(leaf: Any, spec: PartitionSpec, sizes: Mapping[str, int]) -> int:
    """Bytes of `leaf` on each device of a mesh with axes of `sizes`; an axis that does not divide is padded up."""
    shape = list(leaf.shape)
    for dim, axes in enumerate(spec):
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            shape[dim] = -(-shape[dim] // sizes[axis])
    return math.prod(shape) * leaf.dtype.itemsize


def bytes_per_device(tree: Any, sizes: Mapping[str, int]) -> int:
    """Bytes that parameters, or optimizer state that mirrors them, take on each device under the sharding rules."""
    shards = jax.tree.map(lambda leaf, spec: shard_bytes(leaf, spec, sizes), tree, specs_of(tree))
    return sum(jax.tree.leaves(shards))


def sharding_table(params: Mapping[str, Any], sizes: Mapping[str, int]) -> list[dict[str, Any]]:
    """One row per parameter, as JSON values: `path`, `shape`, `dtype`, `spec` (axis names or None), `bytes` per device."""
    rows = []
    for path, leaf in parameter_paths(params).items():
        spec = parameter_spec(path)
        shown = [axis if axis is not None and sizes[axis] > 1 else None for axis in spec]
        rows.append(
            {
                "path": path,
                "shape": list(leaf.shape),
                "dtype": leaf.dtype.name,
                "spec": shown + [None] * (len(leaf.shape) - len(shown)),
                "bytes": shard_bytes(leaf, spec, sizes),
            }
        )
    return rows


class Activations(NamedTuple):
    """Estimated bytes on one device.

    Fields:
        saved: residuals of all layers from the forward to the backward pass, and the final hidden state.
        layer: memory of the backward pass of the costliest layer while it recomputes that layer; every intermediate result
            counts, although the compiler fuses some away, and padded expert buffers count at their full length.
        weights: a layer's weights gathered along `fsdp`, and their gradient before it is split again.
        logits: one chunk of logits and its gradient, float32.
    """

    saved: int
    layer: int
    weights: int
    logits: int

    @property
    def total(self) -> int:
        """Layers and logits are not live at the same time."""
        return self.saved + max(self.layer + self.weights, self.logits)


def estimate_activations(config: Config, model: Transformer, params: dict[str, Any], stage: Stage) -> Activations:
    """`Activations` of one micro-batch of `stage`.

    Tensor parallelism is left out of the activations, of which it splits only some: they are counted as without it, an upper
    bound.
    """
    settings = getattr(config.train, stage.name)
    sizes = config.parallel.sizes()
    rows, length = settings.batch_size // settings.accumulation, settings.longest
    n_parts = math.prod(sizes.values()) // sizes["tensor"]
    trainable, frozen = split_parameters(params, stage.trains)
    saved = layer = weights = 0
    for stack in model.stacks:
        parts = _one_layer(trainable.get(stack.name, {})), _one_layer(frozen.get(stack.name, {}))
        policies = {config.model.remat, "none"}
        residuals = {policy: _residual_bytes(config, stack, parts, stage, rows, length, policy) for policy in policies}
        kept, held = residuals[config.model.remat], residuals["none"]
        saved += stack.n_layers * kept // n_parts
        layer = max(layer, held // n_parts)
        weights = max(
            weights, _gathered_bytes(stack.name, parts[0], sizes) + _gathered_bytes(stack.name, merge_parameters(*parts), sizes)
        )
    hidden = rows * length * config.model.hidden_dim * jnp.dtype(config.model.dtype).itemsize // n_parts
    logits = min(LOGITS_PER_CHUNK, rows * length * config.model.vocab_size // math.prod(sizes.values()))
    return Activations(saved + hidden, layer, weights if sizes["fsdp"] > 1 else 0, 2 * 4 * logits * stage.has_lm_loss)


def _one_layer(stacked: dict[str, Any]) -> dict[str, Any]:
    one = lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
    return nested_parameters({path: one(leaf) for path, leaf in parameter_paths(stacked).items()})


def _gathered_bytes(stack: str, layer_params: dict[str, Any], sizes: dict[str, int]) -> int:
    """Bytes of one layer's parameters on a device that has gathered them along `fsdp`."""
    gathered = sizes | {"fsdp": 1}
    return sum(
        shard_bytes(leaf, PartitionSpec(*parameter_spec(f"{stack}/{path}")[1:]), gathered)
        for path, leaf in parameter_paths(layer_params).items()
    )


def _residual_bytes(
    config: Config,
    stack: BlockStack,
    parts: tuple[dict[str, Any], dict[str, Any]],
    stage: Stage,
    rows: int,
    length: int,
    policy: str,
) -> int:
    """Bytes over all devices, parameters left out, that one layer keeps for its backward pass under `policy`."""
    sizes = config.parallel.sizes() | {"tensor": 1}
    request = AttentionRequest(stage.attention, stage.indexer_loss)

    def kept(x: Any, trainable: Any, frozen: Any, context: Any) -> list[Any]:
        def layer(x: Any, trainable: Any) -> tuple[Any, Any]:
            everything = {"params": merge_parameters(trainable, frozen)}
            result: Any = stack.block.apply(everything, x, context, request)
            return result[0], result[1].indexer_kl

        # In the warm-up only indexers learn, and no gradient reaches what goes in.
        of = (x, trainable) if stage.has_lm_loss else (trainable,)
        run = layer if stage.has_lm_loss else lambda trainable: layer(x, trainable)
        _, pullback = jax.vjp(rematerialised(run, policy, in_scan=True), *of)
        parameters = {id(leaf) for leaf in jax.tree.leaves((trainable, frozen))}
        leaves = {id(leaf): leaf for leaf in jax.tree.leaves(pullback)}
        return [leaf for key, leaf in leaves.items() if key not in parameters]

    shape = (rows, length)
    tokens: Any = lambda dtype: jax.ShapeDtypeStruct(shape, dtype)
    x = jax.ShapeDtypeStruct((*shape, config.model.hidden_dim), jnp.dtype(config.model.dtype))
    topk = min(config.model.attention.indexer.topk, length)
    previous: Any = jax.ShapeDtypeStruct((*shape, topk), jnp.int32) if stack.layer.role == SHARED else None
    context = LayerContext(tokens(jnp.int32), Visible(tokens(jnp.int32), tokens(jnp.int32)), previous)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    with jax.sharding.use_abstract_mesh(mesh):
        leaves = jax.eval_shape(kept, x, *parts, context)
    return sum(shard_bytes(leaf, PartitionSpec(), sizes) for leaf in leaves)
