"""The op benchmark at toy size: right results are timed, wrong ones only reported."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.benchmarks import op_calls, op_checks, ops, timing
from dsa_jax.benchmarks.op_shapes import OPS, SHAPES, OpShape

TOY = OpShape(4, 16, 6, heads=2, dim=20, d_v=16, index_heads=2, index_dim=16, dtype="float32")


@pytest.fixture
def toy(monkeypatch):
    for op in OPS:
        monkeypatch.setitem(SHAPES, op, {"laptop": TOY})


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(("op", "implementation"), [("sparse_attention_backward", "xla"), ("index_topk", "pallas")])
def test_rows(op, implementation):
    lines = []
    (row,) = ops.run(op, [], [implementation], small=True, report=lines.append)
    assert row["op"] == op and row["implementation"] == implementation and row["dtype"] == "float32"
    assert 0 < row["p10"] <= row["seconds"] <= row["p90"]
    assert row["tflops_per_second"] == row["flops"] / row["seconds"] / 1e12
    assert row["interpreted"] == (implementation == "pallas") and row["share_of_floor"] is None
    assert len(lines) == 2 and op in lines[1]


@pytest.mark.usefixtures("toy")
def test_wrong_result_gets_no_time(monkeypatch):
    right = op_calls.make_call

    def make_call(op, shape, implementation):
        call = right(op, shape, "reference")
        if implementation == "reference":
            return call
        return lambda **arrays: {"scores": call(**arrays)["scores"] + 0.01}

    monkeypatch.setattr(op_checks, "make_call", make_call)
    monkeypatch.setattr(timing, "measure", lambda *_, **__: pytest.fail("a wrong result was timed"))
    lines = []
    with pytest.raises(op_checks.CheckError, match="index_scores, xla: scores"):
        ops.run("index_scores", implementations=["xla"], small=True, report=lines.append)
    assert len(lines) == 1


def test_unknown_names():
    with pytest.raises(ValueError, match="expected one of index_scores"):
        ops.run("sort")
    with pytest.raises(ValueError, match="shape is 'huge'; expected one of laptop"):
        ops.run("decode", ["huge"])
    with pytest.raises(ValueError, match="implementation is 'triton'"):
        ops.run("decode", [], ["triton"])


def test_compare():
    want = np.array([1.0, -np.inf, 2.0])
    op_checks.compare("x", want + 1e-6, want, 1e-5, 0.0, 1.0)
    with pytest.raises(op_checks.CheckError, match="-inf in only one"):
        op_checks.compare("x", np.array([1.0, 0.0, 2.0]), want, 1e-5, 0.0, 1.0)
    with pytest.raises(op_checks.CheckError, match=r"x: 2.1 at \(2,\); expected 2.0"):
        op_checks.compare("x", np.array([1.0, -np.inf, 2.1]), want, 1e-3, 0.01, 1.0)
    with pytest.raises(op_checks.CheckError, match="cosine distance"):
        op_checks.compare("x", np.array([1.0, 0.0]), np.array([1.0, 1.0]), float("inf"), 0.0, 1e-4)
    with pytest.raises(op_checks.CheckError, match="expected 3"):
        op_checks.compare("selection", np.array([1, 2]), np.array([1, 3]), 0.0, 0.0, 0.0)


@pytest.mark.parametrize(("below", "method"), [(0.0, "block_until_ready"), (60.0, "chain of")])
def test_timing(below, method):
    arrays = {"x": jnp.ones((8, 8)), "index": jnp.arange(8)}
    timed = timing.measure(
        lambda given: given["x"] @ given["x"][given["index"]], (arrays,), repeats=4, warm_seconds=0.0, chain_below=below
    )
    assert timed.timing.startswith(method) and timed.repeats == 4 and timed.seconds > 0
