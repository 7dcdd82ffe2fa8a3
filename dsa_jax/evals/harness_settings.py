"""The generation settings of lm-evaluation-harness tasks, in the words of `dsa_jax.generation.generate`."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from dsa_jax.config.checks import shown

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names for the number of new tokens; the first that is given counts, as in the harness."""

_NEUTRAL = {
    "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "repetition_penalty": 1, "no_repeat_ngram_size": 0,
    "typical_p": 1, "min_p": 0, "presence_penalty": 0, "frequency_penalty": 0, "use_cache": True,
}  # fmt: skip
"""Settings that change nothing at this value; any other is not computed here."""

_READ = ("until", *_LENGTHS, "max_length", "do_sample", "temperature", "top_p", "top_k", "seed")

N = TypeVar("N", int, float)


class GenerationSettings(NamedTuple):
    """What a task asks of a generation.

    Fields: `until` strings that end it; `new_tokens` at most, None where the task does not say; `max_length` of prompt and
    continuation together, None where it does not say; `temperature`, 0 for greedy; `top_p`, `top_k`, `seed` of the draws.
    """

    until: list[str]
    new_tokens: int | None
    max_length: int | None
    temperature: float
    top_p: float
    top_k: int
    seed: int


def read_generation_settings(settings: Mapping[str, Any]) -> GenerationSettings:
    """The settings of a request. Greedy unless a positive temperature is given and `do_sample` is not false.

    Raises:
        ValueError: for a setting that is not known, is no number, or is known to need what is not computed here.
    """
    if unknown := sorted(settings.keys() - {*_READ, *_NEUTRAL}):
        raise ValueError(f"generation settings {', '.join(unknown)} are not known; expected {', '.join((*_READ, *_NEUTRAL))}.")
    for name, neutral in _NEUTRAL.items():
        if settings.get(name) is not None and settings[name] != neutral:
            raise ValueError(
                f"the generation setting {name} is {settings[name]!r}; expected {neutral}. Leave it out of the task."
            )
    until = settings.get("until") or []
    until = [until] if isinstance(until, str) else until
    if not isinstance(until, list | tuple) or not all(isinstance(stop, str) for stop in until):
        raise ValueError(f"the generation setting until is {shown(until)}; expected a string, or a list of strings.")
    temperature = _number(settings, "temperature", float) or 0.0
    samples = settings.get("do_sample")
    if samples is not None and not samples:
        temperature = 0.0
    # What only restricts the draws is nothing to a greedy generation, whatever its value.
    top_p, top_k = (_number(settings, "top_p", float), _number(settings, "top_k", int)) if temperature > 0.0 else (None, None)
    lengths = [length for name in _LENGTHS if (length := _number(settings, name, int)) is not None]
    return GenerationSettings(
        list(until),
        lengths[0] if lengths else None,
        _number(settings, "max_length", int),
        temperature,
        1.0 if top_p is None else top_p,
        max(0, top_k or 0),
        _number(settings, "seed", int) or 0,
    )


def _number(settings: Mapping[str, Any], name: str, kind: Callable[[Any], N]) -> N | None:
    value = settings.get(name)
    try:
        return None if value is None else kind(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"the generation setting {name} is {value!r}; expected a number.") from None
