"""Block sizes of the GPU kernels as data: a default rule beside each kernel, and a table of what was measured to be faster.

`table.json` holds, per kernel, device kind and shape, the block sizes that `python -m experiments.tune` found on that device,
with what measured them. A kernel asks `choose_tiles`; without an entry that fits it runs with its own default.
"""

from pallas_kernels.tuning.choice import Choice, choose_tiles, recorded, trial
from pallas_kernels.tuning.kernels import KERNELS, KernelSpec, Shape, candidates, has_few_queries, misfit
from pallas_kernels.tuning.table import TABLE, Entry, TuningError, merge, nearest, read, write
from pallas_kernels.tuning.tiles import AnyTiles, QueryTiles, RowTiles, ScanTiles, SplitTiles, Tiles, WarpgroupTiles

__all__ = [
    "KERNELS",
    "TABLE",
    "AnyTiles",
    "Choice",
    "Entry",
    "KernelSpec",
    "QueryTiles",
    "RowTiles",
    "ScanTiles",
    "Shape",
    "SplitTiles",
    "Tiles",
    "TuningError",
    "WarpgroupTiles",
    "candidates",
    "choose_tiles",
    "has_few_queries",
    "merge",
    "misfit",
    "nearest",
    "read",
    "recorded",
    "trial",
    "write",
]
