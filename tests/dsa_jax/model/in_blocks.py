"""Parameters in fp8 blocks whose scales differ, and what they stand for, element by element along the definition."""

import jax.numpy as jnp
import numpy as np

from dsa_jax.model import abstract_params, build_model
from dsa_jax.params import nested_parameters, parameter_paths
from pallas_kernels.quantize import QuantizedBlocks
from tests.dsa_jax.model.small import small_config


def random_blocks(*shape, seed=0, size=0.15):
    """Kernels of about `size`, each block with a scale of its own."""
    rng = np.random.default_rng(seed)
    grid = (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    scales = jnp.asarray(size / 64 * np.exp(rng.standard_normal(grid)), jnp.float32)
    return QuantizedBlocks(jnp.asarray(64 * rng.standard_normal(shape), jnp.float8_e4m3fn), scales)


def meaning(blocks):
    """values[i, j] * scales[i // 128, j // 128], float32."""
    values, scales = np.asarray(blocks.values).astype(np.float32), np.asarray(blocks.scales)
    rows, columns = (np.arange(size) // 128 for size in values.shape[-2:])
    return values * scales[..., rows, :][..., columns]


def in_fp8(kind, **fields):
    """(model, parameters) of `small_config` in fp8 blocks; what is not in fp8 is drawn as well."""
    model = build_model(small_config(kind, weight_format="fp8_blocks", **fields))
    shapes = parameter_paths(abstract_params(model))
    rng = np.random.default_rng(1)
    params = {}
    for seed, (path, leaf) in enumerate(shapes.items()):
        if leaf.dtype == jnp.float8_e4m3fn:
            params[path], params[path.removesuffix("kernel") + "block_scales"] = random_blocks(*leaf.shape, seed=seed)
        elif not path.endswith("block_scales"):
            params[path] = jnp.asarray(0.2 * rng.standard_normal(leaf.shape) + path.endswith("scale"), leaf.dtype)
    return model, nested_parameters({path: params[path] for path in shapes})


def widened_params(params):
    """The same parameters, plain float32."""
    paths = parameter_paths(params)
    plain = {path: leaf for path, leaf in paths.items() if not path.endswith("block_scales")}
    for path, leaf in plain.items():
        if leaf.dtype == jnp.float8_e4m3fn:
            scales = paths[path.removesuffix("kernel") + "block_scales"]
            plain[path] = jnp.asarray(meaning(QuantizedBlocks(leaf, scales)))
    return nested_parameters(plain)
