"""The device mesh."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from dsa_jax.config import AXES, ConfigError, ParallelConfig
from dsa_jax.config import BATCH_AXES as BATCH_AXES


def make_mesh(config: ParallelConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes of `config.AXES`, sized as `config` says, over `devices` (None: all of them).

    Raises:
        ConfigError: when the sizes do not multiply to the number of devices.
    """
    sizes = config.sizes()
    devices = jax.devices() if devices is None else devices
    needed = math.prod(sizes.values())
    if needed != len(devices):
        shown = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one device"
        raise ConfigError(
            f"parallel ({config.preset}) needs {needed} devices ({shown}); there are {len(devices)}. Change parallel.preset, "
            "or show the process as many devices."
        )
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
