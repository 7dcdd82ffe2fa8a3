"""The mesh of devices."""

import math
import re
from dataclasses import dataclass

from dsa_jax.config.checks import ConfigError, shown
from dsa_jax.config.limits import (
    Range,
    Text,
    limited,
)

AXES = ("data", "fsdp", "expert", "tensor", "context")
"""Axes of the device mesh, outermost first."""
BATCH_AXES = ("data", "fsdp", "expert")
"""Axes over which the rows of a batch are split."""
_AXIS_OF = {"dp": "data", "fsdp": "fsdp", "ep": "expert", "tp": "tensor", "cp": "context"}


@dataclass
class ParallelConfig:
    """How many devices each mesh axis has. A preset names a layout; an axis that is not 0 overrides it."""

    preset: str = limited(
        "single", Text(200)
    )  # single, or axes with sizes joined by _: fsdp8, ep8, tp8, ep4_tp2, fsdp2_tp2_cp2, dp2_fsdp4
    data: int = limited(0, Range(0, 2**16))  # dp: batch rows split, parameters replicated
    fsdp: int = limited(0, Range(0, 2**16))  # batch rows and parameters split
    expert: int = limited(0, Range(0, 2**16))  # ep: batch rows and experts split
    tensor: int = limited(0, Range(0, 2**16))  # tp: heads, MLP columns and vocabulary split
    context: int = limited(0, Range(0, 2**16))  # cp: positions split

    def validate(self) -> None:
        self.sizes()

    def sizes(self) -> dict[str, int]:
        """Devices along each axis, in the order of the mesh."""
        return {name: getattr(self, name) or size for name, size in _preset_sizes(self.preset).items()}

    @property
    def row_parts(self) -> int:
        """Parts that the rows of a batch are split into: devices along `BATCH_AXES`."""
        sizes = self.sizes()
        return math.prod(sizes[axis] for axis in BATCH_AXES)


def _preset_sizes(preset: str) -> dict[str, int]:
    sizes = dict.fromkeys(AXES, 1)
    if preset == "single":
        return sizes
    for part in preset.split("_"):
        match = re.fullmatch(r"(dp|fsdp|ep|tp|cp)([1-9][0-9]{0,4})", part)
        name = _AXIS_OF[match[1]] if match else ""
        if not match or sizes[name] != 1:
            raise ConfigError(
                f"parallel.preset is {shown(preset)}; expected 'single', or each of dp, fsdp, ep, tp and cp at most once with "
                "its size, joined by _: such as fsdp8 or ep4_tp2."
            )
        sizes[name] = int(match[2])
    return sizes
