r"""Give a dense model sparse attention: pretraining if the recipe has it, indexer warm-up, sparse training, report.

    python -m experiments.retrofit --config=configs/quickstart.py --workdir=runs/quickstart

Any field can be overridden (`--config.train.warmup.steps=100`). The same command continues an interrupted run. Several
processes make one run when launched by `srun`, or with --coordinator, --num_processes and --process_id: docs/multi_host.md.
"""

from pathlib import Path

from absl import flags

from experiments.flags import ConfigFlag, ProcessFlags, run_main
from experiments.values import path_flag

_CONFIG = ConfigFlag("configs/quickstart.py")
_WORKDIR = path_flag("workdir", "runs/quickstart", "Run directory: created, or continued if it holds the same configuration.")
_PROCESSES = ProcessFlags()
_TENSORBOARD = flags.DEFINE_boolean("tensorboard", False, "Add tensorboard to --config.train.trackers.")


def main(argv: list[str]) -> None:
    """Run the retrofit."""
    del argv
    from dsa_jax.config import ConfigError
    from dsa_jax.retrofit import retrofit

    if not _WORKDIR.value:
        raise ConfigError("--workdir is empty; expected a directory.")
    _PROCESSES.start()
    config = _CONFIG.checked
    if _TENSORBOARD.value and "tensorboard" not in config.train.trackers:
        config.train.trackers = (*config.train.trackers, "tensorboard")
    retrofit(config, Path(_WORKDIR.value))


if __name__ == "__main__":
    run_main(main)
