"""What accelerators can do at most."""

from typing import NamedTuple


class Peaks(NamedTuple):
    """Operations a second in bfloat16 and in fp8, bytes a second."""

    flops: float
    fp8_flops: float
    bytes: float


# H200: bfloat16 and bandwidth measured by others on one, fp8 assumed. H100: the same chip; its bandwidth is the data sheet's.
_PEAKS = {"H200": Peaks(788e12, 1500e12, 4.3e12), "H100": Peaks(788e12, 1500e12, 3.35e12)}


def peaks_of(device_kind: str) -> Peaks | None:
    """The peaks of a device by its kind, as JAX names it ("NVIDIA H200"); None for one that is not listed."""
    return next((peaks for name, peaks in _PEAKS.items() if name in device_kind), None)
