r"""The parity table of a checkpoint: dense, sparse and the baselines on the same weights.

    python -m experiments.evaluate --checkpoint=runs/quickstart
    python -m experiments.evaluate --checkpoint=runs/quickstart --tasks=multi_needle,passkey --task_len=256
    python -m experiments.evaluate --checkpoint=HF_DIR --text_tasks=needle,text_quote --lengths=512,2048 --topk=128,256
    python -m experiments.evaluate --checkpoint=HF_DIR --config.data.text.path=TEXT --config.eval.text_len=4096

A run directory brings its own data and evaluation settings, and no others can be set; for a Hugging Face directory they come
from `--config`. The mesh is always that of `--config`, such as --config.parallel.preset=fsdp8, whatever the run was trained on;
several processes are launched as for experiments.retrofit.
"""

import dataclasses
from pathlib import Path

from dsa_jax.config import ARGMAX, BOTH, GENERATION, TASKS, TEXT_TASKS
from dsa_jax.config.limits import COUNT, LENGTH, Choices
from dsa_jax.config.selections import eval_rows
from experiments.flags import ConfigFlag, ProcessFlags, run_main
from experiments.output import OutputFlag
from experiments.values import limited_flag, list_flag, path_flag

_CHECKPOINT = path_flag("checkpoint", None, "Run directory, or Hugging Face directory, to evaluate.", required=True)
_ROWS = list_flag("rows", [], Choices(lambda: tuple(eval_rows())), "Rows of the table; empty: as the configuration has it.")
_TASKS = list_flag("tasks", [], Choices(TASKS), "Synthetic tasks, a column each; empty: as the configuration has it.")
_TASK_LEN = limited_flag("task_len", None, int, LENGTH, "Tokens in a row of the tasks; empty: as the configuration has it.")
_TASK_SEQUENCES = limited_flag("task_sequences", None, int, COUNT, "Rows of each task; empty: as the configuration has it.")
_TEXT_TASKS = list_flag(
    "text_tasks", [], Choices(TEXT_TASKS), "Tasks in plain words, a column each; empty: as the configuration has it."
)
_LENGTHS = list_flag("lengths", [], LENGTH, "Tokens in a row of the text tasks; empty: as the configuration has it.", int)
_SCORING = limited_flag(
    "text_task_scoring",
    None,
    str,
    Choices((ARGMAX, GENERATION, BOTH)),
    "What counts as an answer to a text task; empty: as the configuration has it.",
)
_TOPK = list_flag("topk", [], COUNT, "Keys to select, each number a set of rows of its own; empty: as the model has it.", int)
_OUTPUT = OutputFlag("JSON file for the table; empty: none.")
_CONFIG = ConfigFlag("configs/retrofit_hf.py")
_PROCESSES = ProcessFlags()


def main(argv: list[str]) -> None:
    """Evaluate and print."""
    del argv
    from dsa_jax.evals.checkpoint import evaluate_checkpoint
    from dsa_jax.report.report import format_about, format_row, format_samples, format_table, format_verdict
    from dsa_jax.run.processes import is_main, on_main

    def show(line: str) -> None:
        if is_main():
            print(line, flush=True)

    _PROCESSES.start()
    on_main(_OUTPUT.check)
    _, table = evaluate_checkpoint(
        Path(_CHECKPOINT.value),
        _CONFIG.checked,
        _ROWS.value,
        tasks=_TASKS.value,
        task_len=_TASK_LEN.value,
        task_sequences=_TASK_SEQUENCES.value,
        text_tasks=_TEXT_TASKS.value,
        lengths=[int(length) for length in _LENGTHS.value],
        text_task_scoring=_SCORING.value,
        topk=[int(budget) for budget in _TOPK.value],
        overrides=_CONFIG.overrides,
        on_row=lambda row: show(format_row(row)),
        on_open=show,
    )
    if not is_main():
        return
    report = dataclasses.asdict(table)
    print(format_table(table.rows))
    # A verdict is on one budget.
    print("\n".join(format_about(report)) if _TOPK.value else format_verdict(report))
    if table.samples:
        print(format_samples(report))
    _OUTPUT.write(report)


if __name__ == "__main__":
    run_main(main)
