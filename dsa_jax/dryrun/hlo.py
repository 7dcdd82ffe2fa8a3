"""The text of a compiled module: its computations, how often each runs, and the arrays in a line."""

import re
from collections import Counter
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) .*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)")
_BODY = re.compile(r"body=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b(pred|bf16|f8\w+|[a-z]\d+)\[([\d,]*)\]")


class Computation(NamedTuple):
    """The lines of a computation, and how often one run of the program runs it.

    What is in a loop counts as often as the loop is known to run (layers, chunks), once where that depends on the data.
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
