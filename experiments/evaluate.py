r"""The parity table of a checkpoint: dense, sparse and the baselines on the same weights.

    python -m experiments.evaluate --checkpoint=runs/quickstart
    python -m experiments.evaluate --checkpoint=HF_DIR --config.data.text.path=TEXT --config.eval.text_len=4096

A run directory brings its own data and evaluation settings; for a Hugging Face directory they come from `--config`.
"""

import dataclasses
import json
from pathlib import Path

from absl import flags

from experiments.flags import define_config, run_main

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Run directory, or Hugging Face directory, to evaluate.", required=True)
_ROWS = flags.DEFINE_list("rows", [], "Rows of the table; empty: as the configuration has it.")
_OUTPUT = flags.DEFINE_string("output", "", "JSON file for the table; empty: none.")
_CONFIG = define_config("configs/retrofit_hf.py")


def main(argv: list[str]) -> None:
    """Evaluate and print."""
    del argv
    from dsa_jax.data import make_eval_data
    from dsa_jax.evals.parity import evaluate_parity
    from dsa_jax.open_checkpoint import is_hf_directory
    from dsa_jax.train.from_hf import load_for_evaluation
    from dsa_jax.train.init import load_run
    from dsa_jax.train.report import format_table

    directory = Path(_CHECKPOINT.value)
    if is_hf_directory(directory):
        config = _CONFIG.value
        config.init.hf_dir = str(directory)
        config, model, params = load_for_evaluation(config)
        source = str(directory)
    else:
        config, model, params, stage = load_run(directory)
        source = f"{directory}, stage {stage}"
    if _ROWS.value:
        config.eval.rows = tuple(_ROWS.value)
    config.validate()
    data = make_eval_data(config.data, config.seed, config.model.vocab_size)
    table = evaluate_parity(model, params, data, config)
    print(source)
    print(format_table(table.rows))
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text(json.dumps(dataclasses.asdict(table), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
