"""The fields in which a command may differ from the run that it continues: moved inputs, more steps, another evaluation."""

import logging
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dsa_jax.config import STAGES, Config, ConfigError, from_dict, to_dict
from dsa_jax.config.fields import flatten
from dsa_jax.run.checkpoints import latest_position
from dsa_jax.run.directory import RunDirectory
from dsa_jax.run.environment import fingerprint, source_fingerprint
from dsa_jax.run.files import RunError
from dsa_jax.run.processes import on_main

_LOG = logging.getLogger(__name__)
_TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_OF_THE_REPORT = re.compile(r"name|eval\..*")


def accepted_fields(run: RunDirectory, config: Config, text_digest: Callable[[], str | None]) -> frozenset[str]:
    """The fields whose values in `config` continue the run, although config.json has others.

    - Paths of `init` and of the tokenizer and the text, where what they name holds what environment.json recorded: it moved.
    - `train.STAGE.steps` and `tokens`, where they make as many steps; or more of them, in the last stage of a run that has
      taken all its steps; any field of a stage after it.
    - `eval` and `name` while there is no report, or where more steps will make another one.

    Every process calls this.

    Args:
        run: it need not have begun.
        config: of the command, resolved.
        text_digest: the digest of the text that `config` names; called, in the first process, where its path differs.
    """
    found = on_main(lambda: _recorded(run))
    if found is None:
        return frozenset()
    recorded, environment = from_dict(Config, found["config"]), found["environment"]
    there, here = flatten(to_dict(recorded)), flatten(to_dict(config))
    differing = {name for name in there if there[name] != here[name]}
    more_steps = _with_more_steps(run, recorded, config, differing)
    moved = on_main(lambda: sorted(_moved(recorded, config, environment, differing, text_digest)))
    accepted = {*more_steps, *moved, *(differing & _of_equal_length(recorded, config))}
    if more_steps or not found["has_report"]:
        accepted |= {name for name in differing if _OF_THE_REPORT.fullmatch(name)}
    return frozenset(accepted)


def _recorded(run: RunDirectory) -> dict[str, Any] | None:
    """Config and environment of a run; None where there are none, of which the one who opens the run says what is wrong."""
    if not run.config_path.is_file():
        return None
    try:
        return {"config": to_dict(run.config()), "environment": run.environment(), "has_report": run.report_path.exists()}
    except RunError:
        return None


def tokenizer_fingerprint(name: str) -> str | None:
    """A digest of the files of the tokenizer `name`, wherever they are; None for one without files, or where they are gone."""
    path = Path(name)
    if path.is_dir():
        return fingerprint(path, "tokenizer.json", *_TOKENIZER_FILES)
    return fingerprint(path.parent, path.name, *_TOKENIZER_FILES) if path.is_file() else None


def set_report_aside(run: RunDirectory) -> None:
    """Rename report.json and report.html after the stage and step that they are of: the run goes on."""
    recorded = run.config()
    last = next(name for name in reversed(STAGES) if getattr(recorded.train, name).n_steps)
    for path in (run.report_path, run.report_path.with_suffix(".html")):
        if path.exists():
            kept = path.with_name(f"report_{last}_{getattr(recorded.train, last).n_steps}{path.suffix}")
            path.rename(kept)
            _LOG.info("%s goes on; its report so far is %s", run.path, kept)


def _moved(
    recorded: Config, config: Config, environment: Mapping[str, Any], differing: set[str], text_digest: Callable[[], str | None]
) -> set[str]:
    moved = set()
    sources = {"init.hf_dir", "init.checkpoint"} & differing
    is_same_source = recorded.init.stage == config.init.stage and bool(recorded.init.hf_dir) == bool(config.init.hf_dir)
    if sources and is_same_source and environment.get("source") == source_fingerprint(config.init) is not None:
        moved |= sources
        tokenizers = recorded.data.text.tokenizer, config.data.text.tokenizer
        if tokenizers == (recorded.init.hf_dir, config.init.hf_dir):
            moved.add("data.text.tokenizer")
    tokenizer = "data.text.tokenizer"
    if tokenizer in differing and environment.get("tokenizer") == tokenizer_fingerprint(config.data.text.tokenizer) is not None:
        moved.add(tokenizer)
    if "data.text.path" in differing and environment.get("text") is not None:
        with suppress(ConfigError):  # of a path without text, of which its own reader says what is wrong
            moved |= {"data.text.path"} if text_digest() == environment["text"] else set()
    return moved


def stage_lengths(config: Config) -> dict[str, int]:
    """The steps of every stage."""
    return {name: getattr(config.train, name).n_steps for name in STAGES}


def _of_equal_length(recorded: Config, config: Config) -> set[str]:
    """The fields that say how long the stages are which are equally long in both configs, in steps or in tokens."""
    there, here = stage_lengths(recorded), stage_lengths(config)
    return {field for name in STAGES if there[name] == here[name] for field in _length_fields(name)}


def _length_fields(stage: str) -> set[str]:
    return {f"train.{stage}.steps", f"train.{stage}.tokens"}


def _with_more_steps(run: RunDirectory, recorded: Config, config: Config, differing: set[str]) -> set[str]:
    """The differing fields of stages, where they ask for more steps after all those of a run are taken; else none."""
    stages = [name for name in STAGES if getattr(recorded.train, name).n_steps]
    if not stages:
        return set()
    last = stages[-1]
    n_taken, n_asked = getattr(recorded.train, last).n_steps, getattr(config.train, last).n_steps
    later = [name for name in STAGES[STAGES.index(last) + 1 :] if getattr(config.train, name).n_steps]
    asked = _length_fields(last) & differing if n_asked > n_taken else set()
    asked |= {name for name in differing for stage in later if name.startswith(f"train.{stage}.")}
    if not asked or n_asked < n_taken:
        return set()
    return asked if latest_position(run, recorded) == (last, n_taken) else set()
