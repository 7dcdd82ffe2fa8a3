"""Cost curves of measured kernels, from a made-up benchmark whose curves are known."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest

from configs import deepseek_v32
from dsa_jax.benchmarks import ops
from dsa_jax.benchmarks.op_shapes import SHAPES
from dsa_jax.config import ConfigError
from dsa_jax.costs.measured import measured_tables, read_rows
from dsa_jax.costs.report import format_measured, plot_costs

N_LAYERS = 61
# Microseconds per query and layer of each op at 32K and at 128K keys; attention to a selection does not grow.
KNOWN = {
    ("index_topk", "prefill"): (2.0, 8.0),
    ("index_topk", "decode"): (1.0, 4.0),
    ("dense_attention", "prefill"): (5.0, 20.0),
    ("dense_attention", "decode"): (10.0, 40.0),
    ("sparse_attention", "128_heads"): (3.0,),
    ("decode", "batch_32"): (6.0,),
}


def made_up(op, name, microseconds, **changes):
    shape = SHAPES[op][name]
    row = {"op": op, "shape": name, "sizes": shape._asdict(), "dtype": "bfloat16", "implementation": "pallas"}
    row |= {"interpreted": False, "device": "Made-up GPU", "seconds": microseconds * 1e-6 * shape.batch * shape.queries}
    return row | changes


@pytest.fixture
def rows():
    made = []
    for (op, name), times in KNOWN.items():
        names = [f"{name}_32k", f"{name}_128k"] if len(times) == 2 else [name]
        made += [made_up(op, name, time) for name, time in zip(names, times, strict=True)]
    return made


@pytest.fixture(scope="module")
def v32():
    return deepseek_v32.get_config().model


def test_known_curves(v32, rows, tmp_path):
    """At the measured lengths the sums of the rows, half-way between them the mean; at 3.6 dollars an hour a us is 0.001 $."""
    tables = measured_tables(v32, rows, 3.6)
    assert tables["positions"][0] == 32768 and tables["positions"][-1] == 131072
    middle = tables["positions"].index(81920)
    expected = {
        ("prefill", "dense"): (5.0, 12.5, 20.0),
        ("prefill", "sparse"): (2.0 + 3.0, 5.0 + 3.0, 8.0 + 3.0),
        ("decode", "dense"): (10.0, 25.0, 40.0),
        ("decode", "sparse"): (1.0 + 6.0, 2.5 + 6.0, 4.0 + 6.0),
    }
    for (phase, attention), microseconds in expected.items():
        curve = tables["dollars_per_million_tokens"][phase][attention]
        got = [curve[0], curve[middle], curve[-1]]
        np.testing.assert_allclose(got, np.multiply(microseconds, N_LAYERS * 1e-3), rtol=1e-9)
    # Equal at the first position of prefill, below everywhere in decode.
    assert tables["pays_from"] == {"prefill": tables["positions"][1], "decode": 32768}
    text = format_measured(tables)
    assert text.startswith("measured on Made-up GPU: attention alone")
    assert "decode, sparse: decode (pallas, bfloat16, 32 queries a call) at 262,144 keys" in text
    assert "decode: sparse is cheaper in the whole range" in text
    plot_costs(tables, "v32", tmp_path / "measured.png")
    assert (tmp_path / "measured.png").stat().st_size > 10_000


def test_the_fastest_way_counts_and_never_a_mixture(v32, rows):
    """A faster implementation at one length only makes no curve; a faster batch of decode does."""
    alone = made_up("index_topk", "prefill_128k", 0.1, implementation="triton")
    interpreted = made_up("decode", "batch_128", 0.1, interpreted=True)
    local = made_up("sparse_attention", "128_heads_local", 0.1)
    faster = made_up("decode", "batch_128", 2.0)
    given = [*rows, alone, interpreted, local, faster]
    tables = measured_tables(v32, [row for row in given if not row["interpreted"]], 3.6)
    curves = tables["dollars_per_million_tokens"]
    assert curves["prefill"]["sparse"][-1] == pytest.approx((8.0 + 3.0) * N_LAYERS * 1e-3)
    assert curves["decode"]["sparse"][-1] == pytest.approx((4.0 + 2.0) * N_LAYERS * 1e-3)


def test_what_is_missing_is_named(v32, rows):
    lacking = [row for row in rows if row["op"] != "decode" and row["shape"] != "prefill_32k"]
    with pytest.raises(ConfigError) as error:
        measured_tables(v32, lacking, 2.0)
    text = str(error.value)
    assert "prefill, dense: dense_attention (many queries of one sequence; heads 128, groups 128" in text
    assert "is measured at 131,072 keys only; expected at least two lengths" in text
    assert "decode, sparse: decode or decode_fp8 (one query of each sequence; heads 128, groups 1, dim 576, d_v 512" in text
    assert "is not measured" in text and "--op=OP --output=FILE" in text
    other = copy.deepcopy(v32)
    other.attention.indexer.topk = 1024
    with pytest.raises(ConfigError, match="topk 1024"):
        measured_tables(other, rows, 2.0)
    with pytest.raises(ConfigError, match="Made-up GPU, Other GPU"):
        measured_tables(v32, [*rows, made_up("decode", "batch_8", 1.0, device="Other GPU")], 2.0)


def test_files(rows, tmp_path):
    """JSON Lines as the benchmark command writes them, the object of the GPU check, and rows of a real measurement on CPU."""
    lines, check = tmp_path / "rows.jsonl", tmp_path / "check.json"
    layer = {"op": "sparse layer", "phase": "prefill", "length": 4096, "seconds": 1.0}
    lines.write_text("".join(json.dumps({**row, "environment": {}}) + "\n" for row in [*rows, layer]))
    items = [{"status": "timed", "row": row} for row in rows] + [{"status": "passed"}]
    items.append({"status": "timed", "row": rows[0] | {"interpreted": True}})
    items.append({"status": "timed", "row": rows[0] | {"op": "decode", "implementation": "peer:flash_mla 1.0"}})
    check.write_text(json.dumps({"items": items}))
    assert [row["op"] for row in read_rows([lines, check])] == 2 * [row["op"] for row in rows]
    lines.write_text("no rows")
    with pytest.raises(ConfigError, match=r"rows\.jsonl is no benchmark file"):
        read_rows([lines])


def test_dense_attention_of_the_benchmark(monkeypatch):
    """The op that the dense curves need is checked and timed on this device."""
    toy = SHAPES["decode"]["laptop"]._replace(queries=2, keys=16, heads=2, dim=12, d_v=8, index_heads=1)
    monkeypatch.setitem(SHAPES, "dense_attention", {"laptop": toy})
    (row,) = ops.run("dense_attention", [], ["xla"], small=True, report=lambda line: None)
    assert row["seconds"] > 0 and row["flops"] == 2 * 2 * 16 * 2 * (12 + 8)


def test_command(rows, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "experiments.costs", f"--benchmark={file}", "--dollars_per_hour=3.6"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "measured on Made-up GPU" in done.stdout and "GFLOP" not in done.stdout
    done = subprocess.run([*command, "--speed=2"], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "--speed does not apply with --benchmark" in done.stderr
