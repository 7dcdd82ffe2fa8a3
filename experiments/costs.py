r"""Savings of sparse attention: dollars per million tokens by position, cache bytes per token, training FLOPs by length.

    python -m experiments.costs
    python -m experiments.costs --config=configs/llama3_8b.py --dollars_per_hour=2.5 --output=runs/costs
    python -m experiments.costs --benchmark=FILE,FILE

The default is DeepSeek-V3.2 on H800s at 2 dollars an hour, whose two curves are figure 3 of the V3.2-Exp report. The model is
analytic, its speeds fitted to that figure (`dsa_jax.costs.model.H800_REPORT`); other models are costed at the same speeds.

With --benchmark nothing is modelled: the curves are those of attention alone, over the lengths measured, from the times that
`experiments.benchmark --output` and `dsa_jax.benchmarks.gpu_check` wrote. The files must cover index_topk and
dense_attention at two lengths each, sparse_attention and decode, in the model's geometry and on one device; missing rows
are named.
"""

import dataclasses
import json
from pathlib import Path

from absl import flags

from dsa_jax.config.limits import FACTOR, PATH, Range
from experiments.flags import ConfigFlag, run_main
from experiments.values import limited_flag, list_flag, path_flag

_CONFIG = ConfigFlag("configs/deepseek_v32.py")
_PRICE = limited_flag("dollars_per_hour", 2.0, float, Range(0, 1e6), "Rent of one GPU.")
_SPEED = limited_flag("speed", 1.0, float, FACTOR, "Speed of the GPU relative to an H800, for every kind of work alike.")
_LENGTH = limited_flag("max_length", 131072, int, Range(1024, 2**30), "Longest position, in tokens.")
_BENCHMARK = list_flag("benchmark", [], PATH, "Files of measured op times, which then replace the model of costs.")
_OUTPUT = path_flag("output", "", "Directory for costs.json and costs.png; empty: none, and no plot.")


def main(argv: list[str]) -> None:
    """Compute, print, plot."""
    del argv
    from dsa_jax.costs.measured import measured_tables, read_rows
    from dsa_jax.costs.model import H800_REPORT
    from dsa_jax.costs.report import cost_tables, format_costs, format_measured, plot_costs
    from dsa_jax.run.files import atomic_write_text, make_writable_directory

    directory = Path(_OUTPUT.value)
    if _OUTPUT.value:
        make_writable_directory(directory, flag="output")
    config = _CONFIG.checked
    config.validate()
    title = config.name
    if _BENCHMARK.value:
        given = [flag.name for flag in (_SPEED, _LENGTH) if flag.present]
        if given:
            raise flags.ValidationError(f"--{given[0]} does not apply with --benchmark, whose rows say it. Leave it out.")
        rows = read_rows([Path(name) for name in _BENCHMARK.value])
        tables = measured_tables(config.model, rows, _PRICE.value)
        title += ", measured"
        print(f"{config.name}: {_PRICE.value:g} dollars per hour")
        print(format_measured(tables))
    else:
        rates = dataclasses.replace(H800_REPORT.faster(_SPEED.value), dollars_per_hour=_PRICE.value)
        tables = cost_tables(config.model, rates, _LENGTH.value)
        print(f"{config.name}: {rates.dollars_per_hour:g} dollars per hour, {_SPEED.value:g} times the H800's speeds")
        print(format_costs(tables))
    if _OUTPUT.value:
        atomic_write_text(directory / "costs.json", json.dumps(tables, indent=1) + "\n")
        plot_costs(tables, title, directory / "costs.png")
        print(f"plot: {directory / 'costs.png'}")


if __name__ == "__main__":
    run_main(main)
