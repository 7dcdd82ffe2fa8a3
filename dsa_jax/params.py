"""Parameters by path string, such as `moe_layers/attention/indexer/wq_b/kernel`.

The same strings key freezing, sharding, Hugging Face names and what tools print.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

BLOCK_SCALES = "block_scales"
"""Name of the leaf beside a `kernel` in fp8 blocks that holds its scales."""


def parameter_paths(params: Mapping[str, Any]) -> dict[str, Any]:
    """Every leaf of a nested dict by its path, in the order of the tree; an empty dict contributes nothing."""
    paths: dict[str, Any] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            paths.update({f"{name}/{rest}": leaf for rest, leaf in parameter_paths(value).items()})
        else:
            paths[name] = value
    return paths


def nested_parameters(paths: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict whose `parameter_paths` are `paths`.

    Raises:
        ValueError: when one path is also the folder of another.
    """
    params: dict[str, Any] = {}
    for path, leaf in paths.items():
        *folders, name = path.split("/")
        place = params
        for folder in folders:
            place = place.setdefault(folder, {})
            if not isinstance(place, dict):
                raise ValueError(f"{path!r} lies below {folder!r}, which is a parameter itself; expected distinct paths.")
        if name in place:
            raise ValueError(f"{path!r} is both a parameter and a folder of parameters; expected distinct paths.")
        place[name] = leaf
    return params


def split_parameters(params: Mapping[str, Any], rule: Callable[[str], bool]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The leaves whose path satisfies `rule`, and the others, each as a nested dict without empty branches."""
    paths = parameter_paths(params)
    chosen = {path: leaf for path, leaf in paths.items() if rule(path)}
    return nested_parameters(chosen), nested_parameters({path: leaf for path, leaf in paths.items() if path not in chosen})


def merge_parameters(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict that holds the leaves of both; inverse of `split_parameters`."""
    return nested_parameters(parameter_paths(first) | parameter_paths(second))


def is_indexer_path(path: str) -> bool:
    """Whether the parameter belongs to a lightning indexer: what the warm-up trains."""
    return "indexer" in path.split("/")


def is_score_bias_path(path: str) -> bool:
    """Whether the parameter is a router's selection bias, which load moves and no gradient reaches."""
    return path.split("/")[-1] == "score_bias"


def is_block_scales_path(path: str) -> bool:
    """Whether the leaf holds the scales of the fp8 kernel beside it: how that is stored, and no parameter of its own."""
    return path.split("/")[-1] == BLOCK_SCALES


def count_parameters(params: Mapping[str, Any]) -> int:
    """Number of scalars but for block scales; leaves may be abstract, as `jax.eval_shape` gives them."""
    return sum(math.prod(leaf.shape) for path, leaf in parameter_paths(params).items() if not is_block_scales_path(path))
