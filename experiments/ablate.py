r"""A sweep: the same retrofit with one thing changed at a time, over several seeds; its table and its plot.

    python -m experiments.ablate --config=configs/ablations/topk.py
    python -m experiments.ablate --config=configs/ablations/topk.py --config.name=short --config.seeds='(0,)' \
        --config.base.train.sparse.steps=20

Writes NAME.json, NAME.md and NAME.png to --results. Runs that are there are not repeated, so the same command continues,
and sweeps share common runs. `python -m experiments.summarize` makes one page of all sweeps.
"""

import shlex
import sys
from pathlib import Path

from dsa_jax.sweeps.sweep import Ablation
from experiments.flags import ConfigFlag, run_main
from experiments.values import path_flag

_CONFIG = ConfigFlag("configs/ablations/topk.py", kind=Ablation)
_WORKDIR = path_flag("workdir", "runs/ablations", "Parent of the run directories; sweeps may share it in turn.")
_RESULTS = path_flag("results", "experiments/results/ablations", "Directory of the result files.")


def main(argv: list[str]) -> int:
    """Run, print the table, draw."""
    del argv
    from dsa_jax.config import ConfigError
    from dsa_jax.run.files import atomic_write_text
    from dsa_jax.sweeps.plot import plot_ablation
    from dsa_jax.sweeps.run import keep_compiled_programs, run_ablation
    from dsa_jax.sweeps.summary import format_markdown

    ablation, workdir, results = _CONFIG.checked, Path(_WORKDIR.value), Path(_RESULTS.value)
    for flag in (_WORKDIR, _RESULTS):
        if not flag.value:
            raise ConfigError(f"--{flag.name} is empty; expected a directory.")
    keep_compiled_programs(workdir / "compiled")
    command = shlex.join(["python", "-m", "experiments.ablate", *sys.argv[1:]])
    result = run_ablation(ablation, workdir, results, command=command)
    if result is None:
        return 0
    page = format_markdown(result)
    atomic_write_text(results / f"{ablation.name}.md", page)
    if any("rows" in run for run in result["runs"]):
        plot_ablation(result, results / f"{ablation.name}.png")
    print(page)
    return 1 if any("failed" in run for run in result["runs"]) else 0


if __name__ == "__main__":
    run_main(main)
