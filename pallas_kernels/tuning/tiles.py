"""Block sizes, warps and stages of a kernel: one frozen dataclass per kind of kernel."""

import dataclasses

# Triton has no matmul with a side below 16, and no array whose size is not a power of two.
SMALLEST_SIDE = 16
# Of Hopper's wgmma: its rows; and the columns at which its reads of shared memory no longer limit it.
WGMMA_ROWS, WGMMA_COLUMNS = 64, 128
# Of an H200.
PROCESSORS = 132


@dataclasses.dataclass(frozen=True)
class AnyTiles:
    """Common base: beside their blocks all have `num_warps` of a program, or its computing warpgroups of four warps each, and
    `num_stages` of loads in flight."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name, size = field.name, getattr(self, field.name)
            smallest = SMALLEST_SIDE if name in ("block_h", "block_k", "block_rows", "block") else 1
            smallest = WGMMA_ROWS if name == "rows" else smallest
            is_power = name not in ("num_stages", "programs", "num_warpgroups")
            if size < smallest or (is_power and size & (size - 1)):
                kind = "a power of two" if is_power else "a number"
                raise ValueError(f"{type(self).__name__}: {name} is {size}; expected {kind} of at least {smallest}.")


@dataclasses.dataclass(frozen=True)
class Tiles(AnyTiles):
    """Heads and keys that a program holds at a time."""

    block_h: int
    block_k: int
    num_warps: int = 8
    num_stages: int = 2


@dataclasses.dataclass(frozen=True)
class SplitTiles(Tiles):
    """As `Tiles`, where few queries are split over several programs each: over at most `programs` in all."""

    programs: int = PROCESSORS


@dataclasses.dataclass(frozen=True)
class QueryTiles(Tiles):
    """As `Tiles`, for programs that hold a block of keys and walk over `block_q` queries."""

    block_q: int = 32


@dataclasses.dataclass(frozen=True)
class WarpgroupTiles(AnyTiles):
    """Of kernels that warpgroups share: each multiplies `rows` keys of a step with the `block_q` queries of its program."""

    block_q: int = 8
    rows: int = 64
    num_warpgroups: int = 2
    num_stages: int = 2

    @property
    def block_k(self) -> int:
        """Keys of a step."""
        return self.rows * self.num_warpgroups


@dataclasses.dataclass(frozen=True)
class RowTiles(AnyTiles):
    """Rows that are added up at a time."""

    block_rows: int = 16
    num_warps: int = 4
    num_stages: int = 2


@dataclasses.dataclass(frozen=True)
class ScanTiles(AnyTiles):
    """Elements of a row that are read at a time."""

    block: int = 4096
    num_warps: int = 8
    num_stages: int = 3
