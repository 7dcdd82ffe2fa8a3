"""From a config to a model and its first parameters."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from dsa_jax.config import ModelConfig
from dsa_jax.config.fields import frozen
from dsa_jax.model.block import Block
from dsa_jax.model.stacks import layer_stacks
from dsa_jax.model.transformer import BlockStack, Transformer
from dsa_jax.parallel.ambient import no_mesh
from dsa_jax.parallel.placement import hold


def build_model(config: ModelConfig) -> Transformer:
    """The transformer that `config` describes. It holds no parameters; equal configs give equal (and hashable) models.

    Raises:
        ConfigError: from `config.validate()`.
    """
    config.validate()
    config = frozen(config)
    stacks = tuple(BlockStack(s.name, s.n_layers, Block(config, s.layer, parent=None)) for s in layer_stacks(config))
    return Transformer(config, stacks, parent=None)


def init_params(model: Transformer, key: PRNGKeyArray) -> dict[str, Any]:
    """Random parameters, a nested dict of arrays; the same key gives the same bits. Works under `jax.eval_shape`.

    On a mesh they come split by the sharding rules: every device draws its own part, of the bits that one device would draw.
    """
    return _init_params(model, key)


def abstract_params(model: Transformer) -> dict[str, Any]:
    """Shapes and dtypes of the parameters; nothing is allocated."""
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


@functools.partial(jax.jit, static_argnums=0)
def _init_params(model: Transformer, key: PRNGKeyArray) -> dict[str, Any]:
    with no_mesh():  # the single token that shapes are drawn from cannot be split
        params = model.init(key, jnp.ones((1, 1), jnp.int32), method="touch")["params"]
    return hold(params)
