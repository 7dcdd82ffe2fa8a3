"""FLOPs of the matrix products of a compiled program, read from its HLO text."""

import math
import re

from dsa_jax.dryrun.hlo import array_shapes, computations

_RESULT = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = ")
_DOT = re.compile(r" = (\w+\[[\d,]*\])\S* dot\((?:\w+\[[\d,]*\]\S* )?%?([\w.\-]+)[,)].*lhs_contracting_dims=\{([\d,]*)\}")


def product_flops(hlo: str) -> int:
    """FLOPs (a multiplication and an addition each count) of every `dot` that a device runs.

    Loops count as in `hlo.Computation`: once where their length depends on the data, as that over the tiles of routed experts.
    Products that became calls of a library, as on GPUs, are not seen.
    """
    total = 0
    for computation in computations(hlo):
        shapes = {}
        for line in computation.lines:
            name = _RESULT.match(line)
            found = array_shapes(line.split(" = ", 1)[1].split("(", 1)[0]) if name else []
            if name and found:
                shapes[name[1]] = found[0].dims
        for line in computation.lines:
            dot = _DOT.search(line)
            if dot:
                contracted = [shapes[dot[2]][int(dim)] for dim in dot[3].split(",") if dim]
                total += computation.times * 2 * math.prod(array_shapes(dot[1])[0].dims) * math.prod(contracted)
    return total
