"""Run a sweep, every (variant, seed) once, with the results in one JSON file."""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from dsa_jax.config import Config, ConfigError
from dsa_jax.config.selections import BEFORE
from dsa_jax.data import make_eval_data
from dsa_jax.evals.parity import evaluate_parity
from dsa_jax.model import build_model
from dsa_jax.retrofit import retrofit
from dsa_jax.run.directory import RunDirectory
from dsa_jax.run.files import RunError, atomic_write_text, claimed, make_writable_directory
from dsa_jax.sweeps.summary import read_result
from dsa_jax.sweeps.sweep import Ablation, Variant, after_dense, dense_part, differences, evaluation_config, run_key
from dsa_jax.train.init import load_run

_LOG = logging.getLogger(__name__)

Run = dict[str, Any]
REPORT = "report.json"


def run_ablation(ablation: Ablation, workdir: Path, results: Path, *, command: str) -> dict[str, Any] | None:
    """Run what is missing in `results`, and write `results`/<name>.json after every run.

    The dense pretraining is done once per seed and shared. A run that another sweep in `results` has is taken from there; other
    seeds in the sweep's own file stay in it. A run that ends in an error is recorded with its message, and repeated by the next
    call. Runs of other settings in the sweep's own file are never dropped: they are a ConfigError.

    Args:
        ablation: the sweep.
        workdir: parent of the run directories, which are named by their recipe: several sweeps may share it, one at a time.
        results: directory of result files.
        command: the command line, recorded with the results; appended to that of the file, where it has other seeds.

    Returns:
        The content of the result file, or None if a signal stopped it; the same call then continues.

    Raises:
        ConfigError: before anything runs, for a sweep that cannot, or whose file holds runs of other settings.
        RunError: before anything runs, where a directory cannot be written, a file of `results` is no result of a sweep, or
            another process runs this sweep.
    """
    ablation.validate()
    make_writable_directory(workdir)
    with claimed(results, f".{ablation.name}.lock", flag="results"):
        return _run_claimed(ablation, workdir, results, command)


def _run_claimed(ablation: Ablation, workdir: Path, results: Path, command: str) -> dict[str, Any] | None:
    path = results / f"{ablation.name}.json"
    pages = [path.with_name(f"{ablation.name}{suffix}") for suffix in (".md", ".png")]
    if foreign := [page for page in pages if os.path.lexists(page) and not path.exists()]:
        raise RunError(
            f"{foreign[0]} is of no sweep, since there is no {path.name}, and would be replaced. Choose another --config.name "
            "or --results."
        )
    known = {run["key"]: run for run in known_runs(results) if "rows" in run}
    own = read_result(path) if path.exists() else {"runs": []}
    earlier = {run["seed"] for run in own["runs"]}
    seeds = sorted({*ablation.seeds, *earlier})
    if earlier - set(ablation.seeds):
        command = " && ".join(dict.fromkeys([*own["command"].split(" && "), command]))
    jobs = {(variant.name, seed): ablation.key(variant, seed) for seed in seeds for variant in ablation.variants}
    if lost := [run for run in own["runs"] if "rows" in run and run["key"] not in jobs.values()]:
        raise ConfigError(
            f"{path} holds {len(lost)} runs of other settings, such as {lost[0]['variant']!r} with seed {lost[0]['seed']}, "
            "which this sweep would drop. Give it another --config.name or --results."
        )
    summary = {
        "name": ablation.name,
        "question": ablation.question,
        "axis": ablation.axis,
        "command": command,
        "variants": [_described(v) for v in ablation.variants],
        "base": differences(ablation.base),
    }

    def result() -> dict[str, Any]:
        runs = [{**known[k], "variant": name, "seed": seed, "key": k} for (name, seed), k in jobs.items() if k in known]
        return {**summary, "seeds": sorted({run["seed"] for run in runs}), "runs": runs}

    def write(content: dict[str, Any]) -> dict[str, Any]:
        atomic_write_text(path, json.dumps(content, indent=1) + "\n")
        return content

    wanted = [(variant, seed) for seed in ablation.seeds for variant in ablation.variants]
    for number, (variant, seed) in enumerate(wanted, start=1):
        key = jobs[variant.name, seed]
        if key not in known:
            _LOG.info("%s: %s, seed %d (run %d of %d)", ablation.name, variant.name, seed, number, len(wanted))
            run = _run(ablation, variant, seed, workdir)
            jax.clear_caches()  # the next run has programs of its own
            if run is None:
                return None
            known[key] = run
            write(result())
    final, before = result(), read_result(path) if path.exists() else {}
    if {**before, "command": ""} == {**json.loads(json.dumps(final)), "command": ""}:
        final["command"] = before["command"]  # nothing was left to do: the command that made the results
    return write(final)


def _described(variant: Variant) -> dict[str, Any]:
    change = variant.change_params
    return {
        "name": variant.name,
        "settings": dict(variant.settings),
        "at_evaluation": dict(variant.at_evaluation),
        "change_params": change.__qualname__ if change else None,
        "row": variant.row,
        "place": variant.place,
    }


def known_runs(results: Path) -> Iterator[Run]:
    """The runs of all result files of a directory.

    Raises:
        RunError: for a file that is no result file.
    """
    for path in sorted(results.glob("*.json")):
        yield from read_result(path)["runs"]


def _run(ablation: Ablation, variant: Variant, seed: int, workdir: Path) -> Run | None:
    """The outcome of one run; None if a signal stopped it."""
    try:
        trained = _train(ablation.config(variant, seed), workdir)
        if trained is None:
            return None
        report = _finished(trained.run)
        rows = report["rows"] if variant.retains_run else _evaluate(trained.run, variant, report["rows"])
    except (ConfigError, RunError) as error:
        _LOG.error("%s, seed %d: %s", variant.name, seed, error)
        return {"failed": str(error)}
    return {
        "rows": rows,
        "trained": [{"key": path.name, "seconds": _seconds(_finished(path))} for path in (trained.dense, trained.run) if path],
        "environment": _environment(report),
    }


class _Trained(NamedTuple):
    run: Path
    dense: Path | None


def _train(config: Config, workdir: Path) -> _Trained | None:
    """The completed run directory of `config` and that of its dense part; None if a signal stopped one of them."""
    run, dense, dense_run = workdir / run_key(config), dense_part(config), None
    if dense is not None:
        dense_run = workdir / run_key(dense)
        if not _complete(dense, dense_run):
            return None
        config = after_dense(config, str(dense_run.absolute()))
    return _Trained(run, dense_run) if _complete(config, run) else None


def _complete(config: Config, path: Path) -> bool:
    """Complete the run of `config` in `path` unless it is; False if a signal stopped it."""
    config.name = path.name  # by its key: variants of several sweeps may share this run
    return (path / REPORT).exists() or retrofit(config, path) is not None


def _finished(run: Path) -> dict[str, Any]:
    try:
        report = RunDirectory(run, resumed=True).report()
        _seconds(report)
        _environment(report)
    except (RunError, KeyError, TypeError) as error:
        raise RunError(f"{run / REPORT} is damaged ({error}). Delete it, and the run is evaluated again.") from error
    return report


def _environment(report: dict[str, Any]) -> dict[str, Any]:
    """What is recorded of the environment of a run."""
    return {name: report["environment"][name] for name in ("python", "versions", "device", "git")}


def _seconds(report: dict[str, Any]) -> float:
    """Wall time of all stages with evaluation and compilation."""
    stages = report["stages"].values()
    return round(sum(stage["seconds"] + stage.get("compile_seconds", 0.0) for stage in stages), 1)


def _evaluate(trained: Path, variant: Variant, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The row of `variant` on the weights of a finished run, after the run's own row of the dense model."""
    run = load_run(trained)
    config = evaluation_config(run.config, variant)
    config.eval.rows = (variant.row,)
    params = variant.change_params(run.params, config.model) if variant.change_params else run.params
    data = make_eval_data(config.data, config.seed, config.model.vocab_size)
    table = evaluate_parity(build_model(config.model), params, data, config)
    return [row for row in rows if row["name"] == BEFORE.title] + table.rows


def keep_compiled_programs(directory: Path) -> None:
    """Set JAX's compilation cache: the seeds of a variant, and a continued sweep, run the same programs."""
    jax.config.update("jax_compilation_cache_dir", str(directory.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
