"""FLOPs and collectives of a compiled program, read from its HLO text."""

import math
import re
from collections import Counter
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) .*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)")
_BODY = re.compile(r"body=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b(pred|bf16|f8\w+|[a-z]\d+)\[([\d,]*)\]")
_RESULT = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = ")
_DOT = re.compile(r" = (\w+\[[\d,]*\])\S* dot\((?:\w+\[[\d,]*\]\S* )?%?([\w.\-]+)[,)].*lhs_contracting_dims=\{([\d,]*)\}")
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")

_OPERATION = re.compile(rf"= (?P<shape>.*?) (?P<kind>{'|'.join(sorted(KINDS, key=len, reverse=True))})(?P<start>-start)?\(")
# Three spellings: {{0,1},{2,3}}, [2,2]<=[4], and mesh['a'=2,'b'=2] {'a'}, where an axis may be split as 'a':(1)2.
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\]|mesh\[([^\]]*)\] \{([^}]*)\})")
_MESH_AXIS = re.compile(r"'([^']+)'=(\d+)")
_GROUP_AXIS = re.compile(r"'([^']+)'(?::\(\d+\)(\d+))?")


class Computation(NamedTuple):
    """The lines of a computation, and how often one run of the program runs it.

    The body of a loop counts as often as the loop is known to run (layers, chunks), once where that depends on the data.
    """

    lines: list[str]
    times: int


class ArrayShape(NamedTuple):
    """Element type and dimensions of an array, such as bf16 and (4, 32)."""

    kind: str
    dims: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.kind}[{','.join(map(str, self.dims))}]"

    @property
    def n_bytes(self) -> int:
        """Bytes of the array."""
        size = 1 if self.kind == "pred" or self.kind.startswith("f8") else max(1, int(re.sub(r"\D", "", self.kind)) // 8)
        for dim in self.dims:
            size *= dim
        return size


def array_shapes(text: str) -> list[ArrayShape]:
    """Every array in `text`, in order."""
    return [ArrayShape(kind, tuple(int(dim) for dim in dims.split(",") if dim)) for kind, dims in _ARRAY.findall(text)]


def computations(hlo: str) -> list[Computation]:
    """Those that a run of the module reaches."""
    bodies, entry = _bodies(hlo)
    times: Counter[str] = Counter()

    def visit(name: str, n: int) -> None:
        times[name] += n
        for line in bodies[name]:
            body, trips = _BODY.search(line), _TRIPS.search(line)
            for group in _CALLED.findall(line):
                for called in re.findall(r"[\w.\-]+", group):
                    if called in bodies:
                        is_loop = body is not None and called == body[1] and trips is not None
                        visit(called, n * int(trips[1]) if is_loop and trips else n)

    if entry:
        visit(entry, 1)
    return [Computation(bodies[name], n) for name, n in times.items()]


def _bodies(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Lines of every computation by name, and the name of the entry."""
    bodies: dict[str, list[str]] = {}
    entry, lines = "", None
    for line in hlo.splitlines():
        header = _COMPUTATION.match(line)
        if header and not line.startswith("HloModule"):
            lines = bodies.setdefault(header["name"], [])
            entry = header["name"] if header["entry"] else entry
        elif line.startswith("}"):
            lines = None
        elif lines is not None:
            lines.append(line)
    return bodies, entry


def matmul_flops(hlo: str) -> int:
    """FLOPs (a multiply-add is two) of every `dot` that a device runs.

    Loops count as in `hlo.Computation`: once where their length depends on the data, as that over the tiles of routed experts.
    Matmuls that became calls of a library, as on GPUs, are not seen.
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
                # The operand is as many times larger as the group has devices.
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
