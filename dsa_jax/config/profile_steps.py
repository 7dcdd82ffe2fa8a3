"""The steps of `train.profile_steps`: parsed, and checked against the stages that a recipe has."""

import re
from collections.abc import Mapping

from dsa_jax.config.checks import ConfigError, shown
from dsa_jax.config.stage import StageConfig

_MOST = 100  # a trace of more steps is too large to open


def profiled_steps(text: str) -> range:
    """The 1-based steps that FIRST:LAST names, both included; none for empty text.

    Raises:
        ConfigError: for anything else.
    """
    if not text:
        return range(0)
    match = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text)
    steps = range(int(match[1]), int(match[2]) + 1) if match else range(0)
    if not steps or steps[0] < 2 or len(steps) > _MOST:
        raise ConfigError(
            f"train.profile_steps is {shown(text)}; expected FIRST:LAST, such as 10:13: at most {_MOST} steps from the second "
            "on, since the first one compiles."
        )
    return steps


def check_profiled_steps(text: str, stages: Mapping[str, StageConfig]) -> None:
    """Require a stage that has the steps, in none of which anything is compiled.

    Args:
        text: as `profiled_steps` takes it.
        stages: those with a positive number of steps, by name.

    Raises:
        ConfigError: naming the stage and what it compiles there.
    """
    steps = profiled_steps(text)
    if not steps:
        return
    longest = max((stage.n_steps for stage in stages.values()), default=0)
    if longest < steps[-1]:
        raise ConfigError(f"train.profile_steps is {text}; expected steps that a stage has: the longest has {longest}.")
    for name, stage in stages.items():
        if stage.n_steps < steps[-1]:
            continue
        new = [step for step in steps if stage.seq_len_at(step - 1) not in {stage.seq_len_at(i) for i in range(step - 1)}]
        if new:
            raise ConfigError(
                f"train.profile_steps is {text}, but step {new[0]} of train.{name} is the first of "
                f"{stage.seq_len_at(new[0] - 1)} tokens (curriculum) and compiles; expected steps of lengths that came before."
            )
        every = stage.evaluate_every
        if every and (looks := [step for step in steps[:-1] if step % every == 0]):
            raise ConfigError(
                f"train.profile_steps is {text}, but after step {looks[0]} of train.{name} held-out rows are looked at "
                f"(evaluate_every {every}); expected steps between two looks."
            )
