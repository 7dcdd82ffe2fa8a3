r"""Find faster block sizes for the kernels of an operation on the GPU at hand, and put them into the tuning table.

python -m experiments.tune --op=sparse_attention --shape=128_heads
python -m experiments.tune --op=decode --limit=48 --unfit=runs/tune/unfit.jsonl
python -m experiments.tune --op=index_scores --interpret --table=table.json    # on CPU: to see it work, not to measure

A run that was cut off continues where it was: trials in --log are not repeated.
"""

import shlex
import sys
from pathlib import Path

from absl import flags

from dsa_jax.benchmarks.op_shapes import OPS
from dsa_jax.config.limits import COUNT, NAME
from experiments.flags import run_main
from experiments.values import limited_flag, list_flag, path_flag

_OP = flags.DEFINE_enum("op", None, OPS, "Op whose kernels to tune.", required=True)
_SHAPE = list_flag("shape", [], NAME, "Names of shapes; empty: all that are meant for a GPU.")
_IMPLEMENTATION = limited_flag(
    "implementation", "pallas", str, NAME, "pallas, pallas_ordered, triton or mosaic, where the op has it."
)
_KERNEL = list_flag("kernel", [], NAME, "Only these of the op's kernels; empty: all.")
_LIMIT = limited_flag("limit", 24, int, COUNT, "Candidates of each kernel, the default first, then the nearest.")
_UNFIT = path_flag("unfit", "", "File that dsa_jax.benchmarks.aot --candidates wrote; what failed there is not tried.")
_LOG = path_flag("log", "runs/tune/trials.jsonl", "JSON Lines file of all trials.")
_TABLE = path_flag("table", "", "Table to write; empty: the one that the kernels read.")
_INTERPRET = flags.DEFINE_bool("interpret", False, "On CPU at tiny sizes, kernels interpreted; needs --table.")


def main(argv: list[str]) -> int | None:
    """Tune; the search prints as it goes."""
    del argv
    from dsa_jax.benchmarks import tuner
    from dsa_jax.benchmarks.op_shapes import SHAPES
    from dsa_jax.benchmarks.worker import NoGpuError
    from pallas_kernels import tuning

    if _INTERPRET.value and not _TABLE.value:
        raise flags.ValidationError("--interpret measures no GPU, so it needs a --table that kernels do not read.")
    try:
        shapes = _SHAPE.value or [name for name in SHAPES[_OP.value] if (name == "laptop") == _INTERPRET.value]
        tuner.run(
            _OP.value,
            shapes,
            _IMPLEMENTATION.value,
            table=Path(_TABLE.value) if _TABLE.value else tuning.TABLE,
            log=Path(_LOG.value),
            command=shlex.join(["python", "-m", "experiments.tune", *sys.argv[1:]]),
            kernels=_KERNEL.value,
            limit=_LIMIT.value,
            interpreted=_INTERPRET.value,
            unfit=tuner.read_unfit(Path(_UNFIT.value)) if _UNFIT.value else set(),
            report=lambda line: print(line, flush=True),
        )
    except NoGpuError as error:
        print(f"error: {error} Or pass --interpret and --table to go through everything on CPU.", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        raise flags.ValidationError(str(error)) from error
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return None


if __name__ == "__main__":
    run_main(main)
