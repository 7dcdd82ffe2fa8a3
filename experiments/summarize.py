r"""One page of all committed results, experiments/results/README.md, from the files beside it.

python -m experiments.summarize
"""

from pathlib import Path

from experiments.flags import run_main
from experiments.values import path_flag

_RESULTS = path_flag("results", "experiments/results", "Directory of the results; its README.md is written.")


def main(argv: list[str]) -> None:
    """Write the page."""
    del argv
    from dsa_jax.run.files import atomic_write_text
    from dsa_jax.sweeps.page import PAGE, render_results

    directory = Path(_RESULTS.value)
    atomic_write_text(directory / PAGE, render_results(directory))
    print(directory / PAGE)


if __name__ == "__main__":
    run_main(main)
