"""The parity table of a checkpoint on disk, of a run or of Hugging Face."""

import copy
import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dsa_jax.checkpoints.from_hf import load_for_evaluation, resolve_checkpoint
from dsa_jax.checkpoints.hf import read_model_config
from dsa_jax.checkpoints.hf.locate import locate_checkpoint
from dsa_jax.checkpoints.open import is_hf_directory
from dsa_jax.checkpoints.text_record import TextRecord, read_text_record
from dsa_jax.config import Config, ConfigError, TrainConfig, to_dict
from dsa_jax.config.checks import positive
from dsa_jax.config.fields import check_kinds, flatten
from dsa_jax.config.selections import eval_rows
from dsa_jax.data import EvalData, make_eval_data
from dsa_jax.evals.parity import Parity, can_run, evaluate_parity
from dsa_jax.foreign import printable
from dsa_jax.opening import opening_line
from dsa_jax.parallel.check import check_layout
from dsa_jax.parallel.placement import on_mesh
from dsa_jax.run.directory import RunDirectory, find_run
from dsa_jax.run.files import RunError
from dsa_jax.run.processes import on_main
from dsa_jax.train.init import find_tokenizer, load_run

_LOG = logging.getLogger(__name__)


def evaluate_checkpoint(
    directory: Path,
    config: Config,
    rows: Sequence[str] = (),
    *,
    tasks: Sequence[str] = (),
    task_len: int | None = None,
    task_sequences: int | None = None,
    text_tasks: Sequence[str] = (),
    lengths: Sequence[int] = (),
    text_task_scoring: str | None = None,
    topk: Sequence[int] = (),
    overrides: Sequence[str] = (),
    on_row: Callable[[dict[str, Any]], None] | None = None,
    on_open: Callable[[str], None] = lambda line: None,
) -> tuple[str, Parity]:
    """(where the parameters are from, the table) of a run directory or a Hugging Face one.

    Args:
        directory: what to evaluate.
        config: `parallel` is the layout of devices, whatever the run was trained on. A run brings everything else with it; of
            a Hugging Face directory `config` says which data and how much.
        rows: of the table; none: as the configuration has it.
        tasks: synthetic tasks to evaluate; none: as the configuration has it.
        task_len: their length in tokens; None: as the configuration has it.
        task_sequences: rows of each; None: as the configuration has it.
        text_tasks: tasks in plain words to evaluate; none: as the configuration has it.
        lengths: their lengths in tokens; none: as the configuration has it.
        text_task_scoring: argmax, generation or both; None: as the configuration has it.
        topk: budgets, of which each gives the rows that depend on it; none: that of the model.
        overrides: fields of `config` that somebody asked for, by names such as `config.eval.text_len`.
        on_row: called with each finished row.
        on_open: called with the line that `opening_line` makes of the model, once it is loaded.

    Raises:
        ConfigError: where the model cannot run a row of `rows` or none of the configuration's, a run cannot follow the
            overrides, the layout does not fit the model, the evaluation or the devices, or the model lacks a task's tokens:
            all before any weight is read.
        RunError, CheckpointError: when the directory cannot be used.
    """
    directory = on_main(lambda: locate_checkpoint(directory))
    is_hf = on_main(lambda: is_hf_directory(directory))
    own = copy.deepcopy(config)
    if is_hf:
        own.init.hf_dir = str(directory)
        own.train = TrainConfig()  # the recipe's stages, whose lengths the checkpoint may not have
        own = resolve_checkpoint(own)
        limit = own.model.max_positions
        if own.eval.text_len > limit and "config.eval.text_len" not in overrides:
            _LOG.warning("eval.text_len is %d instead of %d: the model has no more positions", limit, own.eval.text_len)
            own.eval.text_len = limit
    else:
        found = find_run(directory)
        own = found.config()
        find_tokenizer(own, found)
        if ignored := [name for name in overrides if not name.startswith("config.parallel.")]:
            raise ConfigError(
                f"{ignored[0]} is set, but {directory} is a run, which is evaluated as its own config.json says; expected only "
                "config.parallel fields. Leave it out, or evaluate what experiments.convert --to_hf writes."
            )
    own.parallel = config.parallel
    own.eval.rows, own.eval.tasks = tuple(rows) or own.eval.rows, tuple(tasks) or own.eval.tasks
    own.eval.task_len = own.eval.task_len if task_len is None else task_len
    own.eval.task_sequences = own.eval.task_sequences if task_sequences is None else task_sequences
    own.eval.text_tasks = tuple(text_tasks) or own.eval.text_tasks
    own.eval.text_task_lens = tuple(lengths) or own.eval.text_task_lens
    own.eval.text_task_scoring = text_task_scoring or own.eval.text_task_scoring
    for budget in topk:
        positive("--topk", budget)
    own.validate()
    trained_on = None
    _check_rows(rows, dataclasses.replace(own, model=read_model_config(directory)) if is_hf else own)
    check_layout(dataclasses.replace(own, train=TrainConfig()))
    own = own.laid_out()
    record = on_main(lambda: read_text_record(directory)) if is_hf and own.data.text_fraction else None
    is_named = bool(own.data.text.path) or any(name.startswith("config.data.") for name in overrides)
    data = (None if is_named or record is None else data_of_report(record, own)) or _eval_data(own)
    data.check(own.eval)
    with on_mesh(config.parallel):
        if is_hf:
            own, model, params = load_for_evaluation(own)
            source = str(directory)
        else:
            run = load_run(directory)
            run.config.parallel, run.config.eval = own.parallel, own.eval
            own, model, params, trained_on = run.config, run.model, run.params, run.text
            source = found.words_for(run.stage)
        on_open(opening_line(own.model, own.parallel, dtype=config.model.dtype if is_hf else ""))
        text = data.text.describe() if data.has_text and data.text is not None else None
        if text is not None:
            _LOG.info("text: %s, tokenizer %s", text["source"], text["tokenizer"])
        if is_hf and (others := unlike_report(directory, own, text["sha256"] if text else None)):
            _LOG.warning(
                "%s was exported by the run %s, whose report is of another evaluation: %s differ. Evaluate --checkpoint=%s for "
                "the numbers of the report, or set these fields as in its config.json",
                *(directory, directory.resolve().parent, ", ".join(others), directory.resolve().parent),
            )
        if record is not None and text is not None and text["sha256"] != record.sha256:
            _LOG.warning(
                "the report of %s is of the text %s (sha256 %s), and this evaluation of %s (sha256 %s): numbers on text differ",
                *(directory, printable(record.source), printable(record.sha256[:12])),
                *(text["source"], text["sha256"][:12]),
            )
        if trained_on and data.text is not None and data.text.describe()["sha256"] != trained_on:
            _LOG.warning(
                "data.text.path %r holds other text than the run was trained on: what is held out of it now may have been "
                "trained on, and text_loss is not that of the run's report",
                own.data.text.path,
            )
        table = evaluate_parity(model, params, data, own, on_row=on_row, budgets=tuple(dict.fromkeys(topk)))
        table.setup = {"checkpoint": source, **table.setup}
        return source, table


def data_of_report(record: TextRecord, config: Config) -> EvalData | None:
    """The data of `config` with the text of `record`, which `config` then names; None where that is not found."""
    theirs = dataclasses.replace(config.data, text=dataclasses.replace(record.settings, tokenizer=config.data.text.tokenizer))
    try:
        check_kinds(theirs, "data.")
        data = make_eval_data(theirs, config.seed, config.model.vocab_size)
    except ConfigError as error:
        _LOG.warning("the text of the report, %s, is not found: %s", printable(record.source), error)
        return None
    assert data.text is not None
    if data.text.describe()["sha256"] != record.sha256:
        return None
    config.data = theirs
    return data


def _eval_data(config: Config) -> EvalData:
    return make_eval_data(config.data, config.seed, config.model.vocab_size)


def unlike_report(directory: Path, config: Config, text_digest: str | None) -> list[str]:
    """The fields in which an evaluation of `directory` differs from the report of the run that exported it, if one did.

    The text is compared by its content, where the run recorded it.
    """
    run = RunDirectory(directory.resolve().parent, resumed=True)
    if run.export_path != directory.resolve() or not run.config_path.is_file():
        return []
    try:
        theirs, recorded = run.config(), run.environment().get("text")
    except RunError:
        return []
    there, here = (
        {**flatten(to_dict(each.data), "data."), **flatten(to_dict(each.eval), "eval.")} for each in (theirs, config)
    )
    differing = {name for name in there if there[name] != here[name]} - {"data.text.tokenizer", "eval.rows"}
    if recorded is not None and config.data.text_fraction:
        differing -= {"data.text.path"}
        differing |= {"data.text.path"} if recorded != text_digest else set()
    return sorted(differing | ({"seed"} if theirs.seed != config.seed else set()))


def _check_rows(asked: Sequence[str], config: Config) -> None:
    possible = [name for name, row in eval_rows().items() if can_run(row, config)]
    impossible = [name for name in asked if name not in possible]
    if impossible or not set(config.eval.rows) & set(possible):
        raise ConfigError(
            f"the model cannot run {', '.join(impossible or config.eval.rows)}: it lacks an indexer, or the weights of an "
            f"attention kind. Expected rows among {', '.join(possible)}."
        )
