"""One quantity over several seeds."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Values by seed; None where a seed has none."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "Spread | None":
        """The values that are there; None where none is."""
        present = tuple(value for value in values if value is not None)
        return cls(present) if present else None

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.values)

    @property
    def half_range(self) -> float:
        """Half the distance between the largest and the smallest."""
        return (max(self.values) - min(self.values)) / 2

    def __str__(self) -> str:
        digits = 3 if abs(self.mean) < 100 else 1
        text = f"{self.mean:.{digits}f}"
        return text if len(self.values) == 1 else f"{text} ± {self.half_range:.{digits}f}"
