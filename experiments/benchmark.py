r"""Measure an operation: one readable table on the terminal and one JSON row per measurement.

python -m experiments.benchmark --op=layer --lengths=4096,16384,32768
python -m experiments.benchmark --op=train_step --lengths=8192,16384
"""

import json
from pathlib import Path

from absl import flags

from experiments.flags import run_main

_OP = flags.DEFINE_enum("op", "layer", ["layer", "train_step"], "What to measure.")
_LENGTHS = flags.DEFINE_list("lengths", [], "Sequence lengths in tokens; empty: the operation's own list.")
_OUTPUT = flags.DEFINE_string("output", "", "JSON Lines file that rows are appended to; empty: none.")

DEFAULT_LENGTHS = {"layer": [4096, 16384, 32768], "train_step": [8192, 16384]}


def main(argv: list[str]) -> None:
    """Measure; the module prints as it goes."""
    del argv
    from dsa_jax.benchmarks import layer, train_step
    from dsa_jax.train.rundir import describe_environment

    try:
        lengths = [int(x) for x in _LENGTHS.value] or DEFAULT_LENGTHS[_OP.value]
    except ValueError as error:
        raise flags.ValidationError(
            f"--lengths is {','.join(_LENGTHS.value)}; expected integers such as 4096,16384."
        ) from error
    module = {"layer": layer, "train_step": train_step}[_OP.value]
    rows = module.run(lengths)
    if _OUTPUT.value:
        where = describe_environment()
        with Path(_OUTPUT.value).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({**row, "environment": where}) + "\n" for row in rows)


if __name__ == "__main__":
    run_main(main)
