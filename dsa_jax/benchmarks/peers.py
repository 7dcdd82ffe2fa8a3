"""Other libraries' kernels beside ours: each is checked against our reference on the same device before it is timed.

A peer that is not installed, does not cover a shape, breaks or is wrong costs a line and nothing else.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from dsa_jax.benchmarks import op_checks, timing
from dsa_jax.benchmarks.op_calls import Arrays, make_inputs
from dsa_jax.benchmarks.peer_calls import PEERS, Peer, PeerCall
from dsa_jax.costs.ops import OpShape


def of_op(op: str, *, report: Callable[[str], None] = print, peers: Sequence[Peer] = PEERS) -> list[Peer]:
    """The peers of `op` that can run here; one line names those that cannot, with the missing requirement."""
    missing = {peer.name: peer.missing() for peer in peers if op in peer.ops}
    if any(missing.values()):
        lacks = ", ".join(f"{name} (lacks {what})" for name, what in missing.items() if what)
        report(f"{op}: peers not run: {lacks}")
    return [peer for peer in peers if peer.name in missing and missing[peer.name] is None]


def run(
    op: str, name: str, shape: OpShape, peer: Peer, *, repeats: int = 20, report: Callable[[str], None] = print
) -> timing.Timing | dict[str, str] | None:
    """Checks `peer` at reduced sizes and at `shape`, then times it there.

    Args:
        name: of the shape, for the lines.

    Returns:
        Its time; {"wrong": message} where it differs from our reference, which is not timed; None where it could not run. The
        reason for either is reported.
    """
    who = f"{op}, {name}, {peer.label()}"
    try:
        prepare = lambda shape, arrays: peer.ops[op](peer.module(), shape, arrays)
        op_checks.check_peer(op, shape, peer.label(), lambda shape, arrays: _results(prepare(shape, arrays)))
        call = prepare(shape, make_inputs(op, shape))
        return _time(call, peer.uses_torch, repeats)
    except NotImplementedError as error:
        report(f"{who} left out: {error}")
    except op_checks.CheckError as error:
        report(f"{who} is wrong, not timed: {error}")
        return {"wrong": str(error)}
    except Exception as error:  # a peer's mistake is not ours: the benchmark goes on
        report(f"{who} broke: {type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}")
    return None


def _results(call: PeerCall) -> Arrays:
    return call.results(call.run(*call.arguments))


def _time(call: PeerCall, uses_torch: bool, repeats: int) -> timing.Timing:
    if uses_torch:
        cuda = importlib.import_module("torch").cuda
        return timing.measure_events(lambda: call.run(*call.arguments), cuda, repeats=repeats)
    return timing.measure(call.run, call.arguments, repeats=repeats)


def share_memory(environment: Any) -> None:
    """Keeps JAX from taking the whole GPU for itself where a peer may need some; call it before JAX starts its device."""
    if any(peer.uses_torch and peer.missing() is None for peer in PEERS):
        environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
