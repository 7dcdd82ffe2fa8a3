r"""The parity table of a checkpoint: dense, sparse and the baselines on the same weights.

python -m experiments.evaluate --checkpoint=runs/quickstart
"""

import dataclasses
import json
from pathlib import Path

from absl import flags

from experiments.flags import run_main

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Run directory whose newest checkpoint is evaluated.", required=True)
_ROWS = flags.DEFINE_list("rows", [], "Rows of the table; empty: as the run's configuration has it.")
_OUTPUT = flags.DEFINE_string("output", "", "JSON file for the table; empty: none.")


def main(argv: list[str]) -> None:
    """Evaluate and print."""
    del argv
    from dsa_jax.data import make_eval_data
    from dsa_jax.evals.parity import evaluate_parity
    from dsa_jax.train.init import load_run
    from dsa_jax.train.report import format_table

    config, model, params, stage = load_run(Path(_CHECKPOINT.value))
    if _ROWS.value:
        config.eval.rows = tuple(_ROWS.value)
    config.validate()
    data = make_eval_data(config.data, config.seed, config.model.vocab_size)
    table = evaluate_parity(model, params, data, config)
    print(f"{_CHECKPOINT.value}, stage {stage}")
    print(format_table(table.rows))
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text(json.dumps(dataclasses.asdict(table), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
