r"""Measure an operation: one readable table on the terminal and one JSON row per measurement.

python -m experiments.benchmark --op=layer --lengths=4096,16384,32768
python -m experiments.benchmark --op=train_step --lengths=8192,16384
python -m experiments.benchmark --op=sparse_attention --shape=128_heads --implementation=xla,pallas
"""

import os

from absl import flags

from dsa_jax.benchmarks.op_shapes import OPS
from dsa_jax.config.limits import NAME, Range
from experiments.flags import run_main
from experiments.output import OutputFlag
from experiments.values import list_flag

LENGTHS = Range(1, 2**30, meaning="positive integers such as 4096,16384, up to 2**30")
_OP = flags.DEFINE_enum("op", "layer", ["layer", "train_step", *OPS], "Op or benchmark to measure.")
_LENGTHS = list_flag(
    "lengths", [], LENGTHS, "layer, train_step: sequence lengths in tokens; empty: the operation's own list.", int
)
_SHAPE = list_flag("shape", [], NAME, "Other ops: names of shapes; empty: laptop on CPU, all others on a GPU.")
_IMPLEMENTATION = list_flag("implementation", [], NAME, "Other ops: implementations; empty: those of the platform.")
_PEERS = flags.DEFINE_bool("peers", True, "Other ops: other libraries' kernels beside ours, where they are installed.")
_OUTPUT = OutputFlag("JSON Lines file that rows are appended to; empty: none.")

DEFAULT_LENGTHS = {"layer": [4096, 16384, 32768], "train_step": [8192, 16384]}


def main(argv: list[str]) -> int | None:
    """Measure; the modules print as they go. A wrong result ends in one line and status 1, without any time."""
    del argv
    from dsa_jax.benchmarks import layer, ops, peers, train_step
    from dsa_jax.benchmarks.op_checks import CheckError
    from dsa_jax.opening import opening_line
    from dsa_jax.run.environment import describe_environment

    _OUTPUT.check()
    is_op = _OP.value in OPS
    if _LENGTHS.value if is_op else _SHAPE.value or _IMPLEMENTATION.value:
        wrong, right = ("--lengths", "--shape") if is_op else ("--shape and --implementation", "--lengths")
        raise flags.ValidationError(f"{wrong} do not apply to --op={_OP.value}; expected {right}.")
    if is_op:
        if _PEERS.value:
            peers.share_memory(os.environ)
        print(opening_line(None), flush=True)
        lines: list[str] = []
        try:
            rows = ops.run(_OP.value, _SHAPE.value, _IMPLEMENTATION.value, with_peers=_PEERS.value, report=lines.append)
        except CheckError as error:
            print(f"wrong, nothing is timed: {error}")
            return 1
        except (ValueError, NotImplementedError) as error:
            raise flags.ValidationError(str(error)) from error
        print("\n".join(lines))
    else:
        lengths = [int(text) for text in _LENGTHS.value] or DEFAULT_LENGTHS[_OP.value]
        if _OP.value == "layer":  # the other one leaves the devices to processes of its own
            print(opening_line(None), flush=True)
        rows = {"layer": layer, "train_step": train_step}[_OP.value].run(lengths)
    where = describe_environment()
    _OUTPUT.append({**row, "environment": where} for row in rows)
    return None


if __name__ == "__main__":
    run_main(main)
