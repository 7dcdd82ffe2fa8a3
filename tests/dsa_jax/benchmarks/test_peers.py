"""Other libraries in the op benchmark: stand-ins that compute with numpy, behind a stand-in of torch, take the whole way."""

import importlib.machinery
import sys
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsa_jax.benchmarks import ops, peers
from dsa_jax.benchmarks.op_shapes import SHAPES, OpShape
from dsa_jax.benchmarks.peer_calls import PEERS

LATENT = OpShape(3, 40, 12, heads=2, dim=576, d_v=512)
INDEX = OpShape(3, 40, index_heads=32, index_dim=32, dtype="float8_e4m3fn")
DENSE = OpShape(3, 40, heads=4, groups=2, dim=16, value_dim=8)


class Event:
    """A CUDA event; every call between two takes a millisecond."""

    calls = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.calls

    def elapsed_time(self, end):
        return float(end.at - self.at)


def module(monkeypatch, name, **content):
    made = types.ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    made.__version__ = "1.2.3"
    vars(made).update(content)
    monkeypatch.setitem(sys.modules, name, made)
    return made


def counted(function):
    def run(*given, **options):
        Event.calls += 1
        return function(*given, **options)

    return run


@pytest.fixture
def torch(monkeypatch):
    Event.calls = 0
    cuda = types.SimpleNamespace(Event=Event, synchronize=lambda: None, is_available=lambda: True)
    back = lambda x, size: jnp.asarray(np.reshape(x, size))
    return module(monkeypatch, "torch", cuda=cuda, from_dlpack=np.asarray, reshape=back, float8_e4m3fn=ml_dtypes.float8_e4m3fn)


def attend(q, keys, indices, scale):
    """(out, lse) of [T, H, D] queries over listed keys; FlashMLA's lse of nothing is +inf."""
    q, keys = q.astype(np.float32), keys.astype(np.float32)
    out, lse = np.zeros((*q.shape[:2], 512), np.float32), np.full(q.shape[:2], np.inf, np.float32)
    for t, listed in enumerate(indices):
        listed = listed[listed >= 0]
        if len(listed):
            logits = scale * q[t] @ keys[listed].T
            lse[t] = np.log(np.exp(logits - logits.max()).sum(-1)) + logits.max()
            out[t] = np.exp(logits - lse[t][:, None]) @ keys[listed, :512]
    return out.astype(ml_dtypes.bfloat16), lse


def sparse_fwd(q, kv, indices, sm_scale, d_v):
    assert q.dtype == ml_dtypes.bfloat16 and q.shape[1] % 64 == 0 and indices.shape[2] % 128 == 0 and d_v == 512
    out, lse = attend(q, kv[:, 0], indices[:, 0], sm_scale)
    return out, lse, lse


def with_kvcache(q, pages, table, lengths, d_v, plan, *, softmax_scale, is_fp8_kvcache, indices):
    assert pages.shape[1:] == (64, 1, 656) and pages.dtype == ml_dtypes.float8_e4m3fn and plan == "plan" and is_fp8_kvcache
    rows = np.ascontiguousarray(pages.reshape(-1, 656).view(np.uint8))
    values = rows[:, :512].view(ml_dtypes.float8_e4m3fn).astype(np.float32).reshape(-1, 4, 128)
    scales, rope = np.ascontiguousarray(rows[:, 512:528]).view(np.float32), np.ascontiguousarray(rows[:, 528:])
    latent = (values * scales[..., None]).reshape(-1, 512)
    keys = np.concatenate([latent, rope.view(ml_dtypes.bfloat16).astype(np.float32)], -1)
    out, lse = attend(q[:, 0], keys, indices[:, 0], softmax_scale)
    return out[:, None], lse[..., None]


def mqa_logits(q, keys_and_scales, weights, start, end, *, clean_logits):
    keys, scales = keys_and_scales
    products = np.maximum(np.einsum("thd,sd->ths", q.astype(np.float32), keys.astype(np.float32)), 0)
    place = np.arange(keys.shape[0])
    visible = (place >= start[:, None]) & (place < end[:, None])
    padded = np.full((len(q), keys.shape[0] + 256), np.nan, np.float32)
    padded[:, : keys.shape[0]] = np.where(visible, np.einsum("ths,th->ts", products, weights) * scales, -np.inf)
    return padded[:, : keys.shape[0]]


def flash_attn_func(q, k, v, *, softmax_scale, causal):
    k, v = (np.repeat(x.astype(np.float32), q.shape[2] // x.shape[2], 2) for x in (k, v))
    logits = softmax_scale * np.einsum("bthd,bshd->bhts", q.astype(np.float32), k)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bhts,bshd->bthd", p / p.sum(-1, keepdims=True), v).astype(ml_dtypes.bfloat16)


CASES = {
    "sparse_attention": (LATENT, "flash_mla", "flash_mla_sparse_fwd", sparse_fwd),
    "decode_fp8": (LATENT, "flash_mla", "flash_mla_with_kvcache", with_kvcache),
    "index_scores": (INDEX, "deep_gemm", "fp8_mqa_logits", mqa_logits),
    "dense_attention": (DENSE, "flash_attn", "flash_attn_func", flash_attn_func),
}


def run(monkeypatch, op, shape):
    monkeypatch.setitem(SHAPES, op, {"laptop": shape})
    # Ours is not what is tested here.
    monkeypatch.setattr(ops.op_checks, "check_reduced", lambda *_, **__: "")
    monkeypatch.setattr(
        ops, "measure", lambda op, name, shape, implementation, **_: ops._row(op, name, shape, implementation, FAST)
    )
    lines = []
    return ops.run(op, implementations=["xla"], small=True, with_peers=True, report=lines.append), lines


FAST = ops.timing.Timing(1.0, 1.0, 1.0, 2, "made up")


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("op", CASES)
def test_right_peer_is_timed_by_events(monkeypatch, op):
    shape, name, function, stub = CASES[op]
    module(monkeypatch, name, get_mla_metadata=lambda: ("plan", None), **{function: counted(stub)})
    (_, row), lines = run(monkeypatch, op, shape)
    assert row["implementation"] == f"peer:{name} 1.2.3" and row["seconds"] == pytest.approx(1e-3)
    assert row["timing"] == "CUDA events" and row["shape"] == "laptop" and not row["interpreted"]
    assert Event.calls == 2 + 2 + 2  # two checks, two warm, two timed
    assert f"peer:{name} 1.2.3" in lines[-1]


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("op", ["sparse_attention", "index_scores"])
def test_wrong_peer_is_reported_and_not_timed(monkeypatch, op):
    shape, name, function, stub = CASES[op]

    def wrong(*given, **options):
        result = stub(*given, **options)
        return result * np.float32(1.01) if op == "index_scores" else (result[0], result[1], result[2] / np.log(2))

    module(monkeypatch, name, **{function: wrong})
    monkeypatch.setattr(ops.timing, "measure_events", lambda *_, **__: pytest.fail("a wrong result was timed"))
    (_, row), lines = run(monkeypatch, op, shape)
    assert row.keys() == {"op", "shape", "implementation", "wrong"}
    assert "is wrong, not timed:" in lines[-1] and ("lse" if op == "sparse_attention" else "scores") in lines[-1]


@pytest.mark.usefixtures("torch")
def test_broken_or_unfit_peer_costs_a_line(monkeypatch):
    def broken(*given, **options):
        raise RuntimeError("no kernel image is available\nmore")

    module(monkeypatch, "flash_mla", flash_mla_sparse_fwd=broken)
    rows, lines = run(monkeypatch, "sparse_attention", LATENT)
    assert len(rows) == 1 and lines[-1].endswith("1.2.3 broke: RuntimeError: no kernel image is available")
    rows, lines = run(monkeypatch, "sparse_attention", DENSE._replace(topk=4))
    assert len(rows) == 1 and "left out: it needs keys of 512 + 64 channels" in lines[-1]


def test_absent_peers_cost_one_line(monkeypatch, torch):
    for name in ("flash_attn", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, None)
    rows, lines = run(monkeypatch, "dense_attention", DENSE)
    missing = "dense_attention: peers not run: flash_attn (lacks flash_attn_interface or flash_attn), cudnn (lacks a GPU)"
    assert len(rows) == 1 and lines[1] == missing
    module(monkeypatch, "flash_attn")
    torch.cuda.is_available = lambda: False
    assert "flash_attn (lacks a GPU that torch can use)" in run(monkeypatch, "dense_attention", DENSE)[1][1]
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "flash_attn (lacks torch)" in run(monkeypatch, "dense_attention", DENSE)[1][1]


def test_a_peer_that_goes_through_jax(monkeypatch):
    cudnn = next(peer for peer in PEERS if peer.name == "cudnn")
    attention = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *x, scale, implementation: attention(*x, scale=scale))
    timed = peers.run("dense_attention", "laptop", DENSE._replace(value_dim=16), cudnn, repeats=2)
    # Which of JAX's two ways depends on how busy the machine is.
    assert timed.repeats == 2 and timed.timing.startswith(("chain of", "block_until_ready"))


def test_short_calls_share_two_events(monkeypatch):
    monkeypatch.setattr(Event, "elapsed_time", lambda self, end: 0.004 * (end.at - self.at))
    cuda = types.SimpleNamespace(Event=Event, synchronize=lambda: None)
    timed = ops.timing.measure_events(counted(lambda: None), cuda, repeats=3, warm_seconds=0.0)
    assert timed.seconds == pytest.approx(4e-6) and timed.timing == "CUDA events around 2000"


@pytest.mark.usefixtures("torch")
def test_memory_is_shared_where_torch_needs_some(monkeypatch):
    environment = {}
    peers.share_memory(environment)
    assert environment == {}
    module(monkeypatch, "deep_gemm")
    peers.share_memory(environment)
    assert environment == {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
