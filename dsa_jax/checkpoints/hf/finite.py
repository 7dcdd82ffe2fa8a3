"""Weights that are NaN or infinite, found while they are read."""

from typing import Any

import numpy as np
from jaxtyping import Shaped

from dsa_jax.checkpoints.hf import CheckpointError
from dsa_jax.checkpoints.hf.safetensors_file import TensorInfo


def as_finite(
    value: Shaped[np.ndarray, "..."], dtype: Any, name: str, info: TensorInfo, first: tuple[int, ...]
) -> Shaped[np.ndarray, "..."]:
    """`value` in `dtype`, once all of it is known to be finite there.

    Args:
        value: a part of the tensor `name`.
        dtype: of the parameter.
        name: as the file has it.
        info: where the tensor lies.
        first: where the part begins in its tensor: indices of leading axes that `value` has not, then the row of its first one.

    Raises:
        CheckpointError: naming the first element that is not.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        converted = value.astype(dtype, copy=False)
    is_finite = np.isfinite(converted)
    if is_finite.all():
        return converted
    index = tuple(int(i) for i in np.unravel_index(np.argmin(is_finite), is_finite.shape))
    stored = float(value[index])
    place = [*first[:-1], index[0] + first[-1], *index[1:]]
    if np.isfinite(stored):
        raise CheckpointError(
            f"{info.file}: {name}{place} is {stored:g}, which is beyond {np.dtype(dtype).name}; expected weights that the type "
            "of the parameters holds. Load it with dtype float32, or get the checkpoint from its source."
        )
    raise CheckpointError(
        f"{info.file}: {name}{place} is {stored:g}; expected finite weights. The file is damaged, or the training that wrote "
        "it diverged: get it from its source, or take an earlier checkpoint."
    )
