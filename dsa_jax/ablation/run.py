"""Run a sweep, every (variant, seed) once, and keep what each gave in one JSON file."""

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from dsa_jax.ablation.ablation import Ablation, Variant, after_dense, dense_part, differences, run_key
from dsa_jax.config import Config
from dsa_jax.train.retrofit import retrofit
from dsa_jax.train.rundir import RunError, atomic_write_text, describe_environment

_LOG = logging.getLogger(__name__)

Run = dict[str, Any]


def run_ablation(ablation: Ablation, workdir: Path, results: Path, *, command: str) -> dict[str, Any] | None:
    """Train what `results` does not hold yet, and write `results`/<name>.json after every run.

    The dense pretraining is done once per seed and shared. A run that another sweep in `results` holds already is taken from
    there. A run that ends in an error is recorded with its message, and tried again by the next call.

    Args:
        ablation: the sweep.
        workdir: holds run directories, named by their recipe: several sweeps may share it, one at a time.
        results: directory of result files.
        command: what the user typed, recorded with the results.

    Returns:
        The content of the result file, or None if a signal stopped it; the same call then continues.

    Raises:
        ConfigError: before anything runs, for a sweep that cannot.
    """
    ablation.validate()
    results.mkdir(parents=True, exist_ok=True)
    known = {run["key"]: run for run in known_runs(results) if "rows" in run}
    path = results / f"{ablation.name}.json"
    summary: dict[str, Any] = {
        "name": ablation.name,
        "question": ablation.question,
        "axis": ablation.axis,
        "command": command,
        "seeds": list(ablation.seeds),
        "variants": [{"name": v.name, "settings": dict(v.settings), "row": v.row, "place": v.place} for v in ablation.variants],
        "base": differences(ablation.base),
        "runs": [],
    }
    jobs = [(variant, seed) for seed in ablation.seeds for variant in ablation.variants]
    for number, (variant, seed) in enumerate(jobs, start=1):
        key = run_key(ablation.config(variant, seed))
        if key not in known:
            _LOG.info("%s: %s, seed %d (run %d of %d)", ablation.name, variant.name, seed, number, len(jobs))
            run = _run(ablation, variant, seed, workdir)
            jax.clear_caches()  # the next run has programs of its own
            if run is None:
                return None
            known[key] = run
        summary["runs"].append({**known[key], "variant": variant.name, "seed": seed, "key": key})
        atomic_write_text(path, json.dumps(summary, indent=1) + "\n")
    return summary


def known_runs(results: Path) -> Iterator[Run]:
    """Every run that the result files of a directory hold.

    Raises:
        RunError: for a file that is no result file.
    """
    for path in sorted(results.glob("*.json")):
        try:
            yield from json.loads(path.read_text(encoding="utf-8"))["runs"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path} is no result of an ablation ({error}). Restore it or delete it.") from error


def _run(ablation: Ablation, variant: Variant, seed: int, workdir: Path) -> Run | None:
    """One run's outcome; None if a signal stopped it."""
    config = ablation.config(variant, seed)
    started = time.perf_counter()
    try:
        report = _train(config, workdir)
    except RunError as error:
        _LOG.error("%s, seed %d: %s", variant.name, seed, error)
        return {"failed": str(error)}
    if report is None:
        return None
    return {
        "rows": report["rows"],
        "stages": {
            stage: {name: round(entry[name], 2) for name in ("steps", "seconds", "compile_seconds") if name in entry}
            for stage, entry in report["stages"].items()
        },
        "seconds": round(time.perf_counter() - started, 1),
        "environment": describe_environment(),
    }


def _train(config: Config, workdir: Path) -> dict[str, Any] | None:
    dense = dense_part(config)
    if dense is not None:
        dense_run = workdir / f"dense_{run_key(dense)}"
        if not (dense_run / "report.json").exists() and retrofit(dense, dense_run) is None:
            return None
        config = after_dense(config, str(dense_run))
    return retrofit(config, workdir / f"{_as_file_name(config.name)}_{run_key(config)}")


def _as_file_name(text: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in text)


def keep_compiled_programs(directory: Path) -> None:
    """Let JAX keep what it compiles in `directory`: the seeds of a variant, and a continued sweep, run the same programs."""
    jax.config.update("jax_compilation_cache_dir", str(directory.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
