"""The layer benchmark at toy size: every row is there and its speedup is the ratio of the times it prints."""

from dsa_jax.benchmarks.layer import format_table, run
from dsa_jax.costs.ops import OpShape


def test_rows_and_table():
    lines = []
    shape = OpShape(1, 1, 4, heads=2, dim=12, d_v=8, index_heads=2, index_dim=4)
    rows = run([16], 1, shape=shape, report=lines.append)
    for phase in ("prefill", "decode"):
        mine = [row for row in rows if row["phase"] == phase]
        assert [row["op"] for row in mine].count("dense layer") == 2
        times = {(row["op"], row["implementation"]): row["seconds"] for row in mine if row["op"] != "speedup"}
        assert all(seconds > 0 for seconds in times.values())
        best = min(seconds for (op, _), seconds in times.items() if op == "dense layer")
        assert mine[-1]["op"] == "speedup" and mine[-1]["ratio"] == best / times["sparse layer", "xla"]
    assert len(format_table(rows).splitlines()) == len(rows) + 1 and len(lines) >= len(rows)
