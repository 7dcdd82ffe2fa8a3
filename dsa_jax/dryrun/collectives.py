"""What a compiled program moves between devices, read from its HLO text."""

import math
import re
from collections import Counter
from typing import NamedTuple

from dsa_jax.dryrun.hlo import ArrayShape, array_shapes, computations

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")

_OPERATION = re.compile(rf"= (?P<shape>.*?) (?P<kind>{'|'.join(sorted(KINDS, key=len, reverse=True))})(?P<start>-start)?\(")
# Three spellings: {{0,1},{2,3}}, [2,2]<=[4], and mesh['a'=2,'b'=2] {'a'}, where an axis may be split as 'a':(1)2.
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\]|mesh\[([^\]]*)\] \{([^}]*)\})")
_MESH_AXIS = re.compile(r"'([^']+)'=(\d+)")
_GROUP_AXIS = re.compile(r"'([^']+)'(?::\(\d+\)(\d+))?")


class Collective(NamedTuple):
    """All collectives of one kind and shape in one run of the program.

    Fields: `shape` on a device, of the gathered result or of what is reduced; `group` devices that take part together, 0 where
    the text does not say; `times` it runs; `bytes` on each device, of all of them.
    """

    kind: str
    shape: str
    group: int
    times: int
    bytes: int


def collectives(hlo: str) -> list[Collective]:
    """The collectives of a compiled module, most bytes first.

    Loops count as in `hlo.Computation`. An asynchronous collective counts where it starts. The bytes of a ragged exchange are
    those of its buffer, the most it can move.
    """
    found: Counter[tuple[str, str, int]] = Counter()
    sizes: dict[tuple[str, str, int], int] = {}
    for lines, n in computations(hlo):
        for line in lines:
            operation = _OPERATION.search(line)
            group = _group_size(line) if operation else 1
            if operation and group != 1:  # alone, nothing moves
                kind = operation["kind"]
                arrays = _arrays(operation["shape"], is_pair=bool(operation["start"]) and kind != "all-reduce")
                # What is scattered was as large as the group before.
                factor = max(group, 1) if kind == "reduce-scatter" else 1
                key = kind, ", ".join(map(str, arrays)), group
                found[key] += n
                sizes[key] = factor * sum(array.n_bytes for array in arrays)
    results = [Collective(*key, count, count * sizes[key]) for key, count in found.items()]
    return sorted(results, key=lambda each: -each.bytes)


def _arrays(shape: str, *, is_pair: bool) -> list[ArrayShape]:
    """Every array in a shape; of an asynchronous (operands, results, ...) only the results."""
    if is_pair and shape.startswith("("):
        parts = _top_level(shape[1:-1])
        shape = parts[1] if len(parts) > 1 else shape
    return array_shapes(shape)


def _top_level(text: str) -> list[str]:
    """`text` cut at commas outside all brackets."""
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    return [*parts, current.strip()]


def _group_size(line: str) -> int:
    groups = _GROUPS.search(line)
    if not groups:
        return 0
    if groups[1]:
        return len(groups[1].split(","))
    if groups[2]:
        return int(groups[2])
    sizes = {name: int(size) for name, size in _MESH_AXIS.findall(groups[3] or "")}
    return math.prod(int(part) if part else sizes[name] for name, part in _GROUP_AXIS.findall(groups[4] or ""))
