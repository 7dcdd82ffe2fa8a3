r"""One page of all committed results, experiments/results/README.md, from the files beside it.

python -m experiments.summarize
"""

from pathlib import Path

from experiments.flags import run_main
from experiments.values import path_flag

_RESULTS = path_flag("results", "experiments/results", "Directory of the results; writes its README.md.")


def main(argv: list[str]) -> None:
    """Write the page."""
    del argv
    from dsa_jax.config import ConfigError
    from dsa_jax.sweeps.page import write_results

    if not _RESULTS.value:
        raise ConfigError("--results is empty; expected a directory.")
    print(write_results(Path(_RESULTS.value)))


if __name__ == "__main__":
    run_main(main)
