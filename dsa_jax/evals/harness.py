"""A model behind the interface of lm-evaluation-harness, so that the field's tasks run on dense and on sparse attention.

    pip install lm-eval
    model = lm_eval_model(load_pretrained(DIR), attention="sparse")
    lm_eval.simple_evaluate(model=model, tasks=["lambada_openai"])

`HarnessScorer` holds the arithmetic and needs no harness: requests are anything with the harness's `args` tuple.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from dsa_jax.checkpoints.pretrained import Pretrained
from dsa_jax.config import ConfigError
from dsa_jax.data import Batch
from dsa_jax.evals.harness_settings import GenerationSettings, read_generation_settings
from dsa_jax.extras import MissingExtraError
from dsa_jax.generation import generate
from dsa_jax.generation.text import TextUntil
from dsa_jax.train.loss import forward_with_loss

_LOG = logging.getLogger(__name__)

SHORTEST_BUCKET = 64
"""Rows are padded to this many tokens or the next power of two, so that few lengths are compiled."""

DEFAULT_NEW_TOKENS = 256
"""Length of a generation whose request says neither `max_gen_toks` nor `max_length`."""


@runtime_checkable
class Request(Protocol):
    """The part of a harness `Instance` that is read."""

    @property
    def args(self) -> tuple[Any, ...]:
        """(context, continuation), (text,) or (context, generation settings)."""
        ...


class Scored(NamedTuple):
    """Log-probability of a continuation, natural log, and whether greedy decoding would have written it."""

    loglikelihood: float
    is_greedy: bool


class Window(NamedTuple):
    """`tokens` to read, whose last `n_scored` are scored given all before them; the first is never scored."""

    tokens: list[int]
    n_scored: int


class HarnessScorer:
    """The three request types of lm-evaluation-harness over a `Pretrained`."""

    def __init__(
        self,
        pretrained: Pretrained,
        *,
        attention: str | None = None,
        batch_size: int = 8,
        max_length: int | None = None,
        add_bos: bool | None = None,
    ) -> None:
        """Score with `pretrained`.

        Args:
            pretrained: needs a tokenizer.
            attention: "dense", "sparse", ...; None is as the checkpoint was trained.
            batch_size: rows per forward pass.
            max_length: longest row in tokens, context and continuation together; longer ones lose their beginning. None: the
                model's `max_positions`.
            add_bos: whether a text starts with begin-of-text, which no text gets twice. None: as the tokenizer starts a text.
                True: with the model's `bos_token_id` where the tokenizer adds none.

        Raises:
            ConfigError: without a tokenizer, or with `add_bos` True and no begin-of-text.
        """
        if pretrained.tokenizer is None:
            raise ConfigError("the checkpoint has no tokenizer; expected a tokenizer.json beside its weights.")
        self.pretrained = pretrained
        self.tokenizer = pretrained.tokenizer
        bos, begin = pretrained.config.bos_token_id, self.tokenizer.encode_prompt("").tolist()
        self._begin = begin or ([bos] if bos >= 0 else [])
        if add_bos and not self._begin:
            raise ConfigError("add_bos is True, but the checkpoint names no bos_token_id. Pass add_bos=False.")
        self.attention = attention
        self.rows_per_batch = batch_size
        self.longest = max_length or pretrained.config.max_positions
        self.adds_begin = bool(begin) if add_bos is None else add_bos
        self._step = _make_score_step(pretrained, attention)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: begin-of-text, or end-of-text where there is none."""
        return self._prefix[-1]

    @property
    def _prefix(self) -> list[int]:
        return self._begin or [self.tokenizer.end_of_text_id]

    def loglikelihood(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[Scored]:
        """log p(continuation | context) of each request `(context, continuation)`."""
        del disable_tqdm
        return self.score([self._pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[float]:
        """log p(text) of each request `(text,)`; every token is scored once, in windows of at most `max_length`."""
        del disable_tqdm
        windows = [rolling_windows(self._encode(r.args[0]), self._prefix, self.longest) for r in requests]
        scores = iter(self.score([window for text in windows for window in text]))
        return [float(sum(next(scores).loglikelihood for _ in text)) for text in windows]

    def generate_until(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[str]:
        """Text of each request `(context, settings)` up to the first of `settings["until"]`, which is left out.

        Settings read: those of `harness_settings`; greedy unless a positive temperature is given and `do_sample` is not false.
        With `max_length`, a limit for context and continuation together, there is no other limit by default.

        Raises:
            ValueError: for a setting that is not known or cannot be followed here, or a context that leaves no room.
        """
        del disable_tqdm
        results = [""] * len(requests)
        for asked, places in _by_settings(requests):
            settings = read_generation_settings(asked)
            by_limit: dict[int, list[tuple[int, list[int]]]] = {}
            for place in places:
                limit, prompt = self._fitted(self._context(requests[place].args[0]) or self._prefix, settings)
                by_limit.setdefault(limit, []).append((place, prompt))
            for limit, rows in by_limit.items():
                for start in range(0, len(rows), self.rows_per_batch):
                    chosen = rows[start : start + self.rows_per_batch]
                    texts = self._generate([prompt for _, prompt in chosen], limit, settings)
                    for (place, _), text in zip(chosen, texts, strict=True):
                        results[place] = text
        return results

    def score(self, windows: Sequence[Window]) -> list[Scored]:
        """Score every window; the longest run first, so that what does not fit fails at once."""
        results: list[Scored | None] = [None] * len(windows)
        order = sorted(range(len(windows)), key=lambda i: -len(windows[i].tokens))
        for start in range(0, len(order), self.rows_per_batch):
            chosen = order[start : start + self.rows_per_batch]
            batch = _score_batch([windows[i] for i in chosen], self.rows_per_batch)
            sums = jax.device_get(self._step(self.pretrained.params, batch))
            for row, place in enumerate(chosen):
                is_greedy = int(sums["correct"][row]) == windows[place].n_scored
                results[place] = Scored(-float(sums["nll"][row]), is_greedy)
        return [result for result in results if result is not None]

    def _encode(self, text: str) -> list[int]:
        """Token ids of `text` without begin-of-text, also where it spells one."""
        tokens = self.tokenizer.encode(text).tolist()
        return tokens[len(self._begin) :] if self._begin and tokens[: len(self._begin)] == self._begin else tokens

    def _context(self, text: str) -> list[int]:
        """Token ids of `text` as a text begins."""
        if self.adds_begin:
            return [*self._begin, *self._encode(text)]
        return self.tokenizer.encode(text).tolist()

    def _pair(self, context: str, continuation: str) -> Window:
        # A space at the end of the context belongs to the first word after it, as tokenizers write it.
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        before = self._context(stripped) if stripped else self._prefix
        scored = self._context(stripped + continuation)[len(before) :] if stripped else self._encode(continuation)
        if not scored:
            raise ValueError(f"the continuation {continuation!r} adds no token to its context; expected some text to score.")
        if len(scored) > self.longest:
            raise ValueError(
                f"a continuation has {len(scored)} tokens, more than max_length ({self.longest}). Raise max_length."
            )
        return Window([*before, *scored][-(self.longest + 1) :], len(scored))

    def _fitted(self, prompt: list[int], settings: GenerationSettings) -> tuple[int, list[int]]:
        """(number of new tokens, the end of `prompt` that leaves room for them)."""
        if settings.max_length is None:
            new_tokens = DEFAULT_NEW_TOKENS if settings.new_tokens is None else settings.new_tokens
            if not 0 <= new_tokens < self.longest:
                raise ValueError(f"max_gen_toks is {new_tokens}; expected from 0 to less than max_length ({self.longest}).")
            return new_tokens, prompt[new_tokens - self.longest :]
        prompt = prompt[1 - self.longest :] if self.longest > 1 else prompt[-1:]
        room = min(settings.max_length, self.longest) - len(prompt)
        if room < 1:
            raise ValueError(
                f"the generation setting max_length is {settings.max_length}, but a context has {len(prompt)} tokens; expected "
                "more, since it counts context and continuation together. Set max_gen_toks instead."
            )
        return room if settings.new_tokens is None else min(room, settings.new_tokens), prompt

    def _generate(self, prompts: list[list[int]], new_tokens: int, settings: GenerationSettings) -> list[str]:
        texts = [TextUntil(self.tokenizer, settings.until) for _ in prompts]
        generate(
            self.pretrained,
            prompts,
            max_new_tokens=new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            seed=settings.seed,
            attention=self.attention,
            on_token=lambda row, token: texts[row].add(token),
        )
        return [text.finish() for text in texts]


def lm_eval_model(pretrained: Pretrained, **options: Any) -> Any:
    """A `lm_eval.api.model.LM` over `pretrained`; `options` as in `HarnessScorer`.

    Raises:
        MissingExtraError: if lm-evaluation-harness is not installed, with the command that installs it.
    """
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise MissingExtraError("the lm-evaluation-harness is not installed. Run: pip install lm-eval") from error

    class HarnessModel(HarnessScorer, LM):
        """`HarnessScorer` as the harness knows models."""

        def __init__(self) -> None:
            LM.__init__(self)
            HarnessScorer.__init__(self, pretrained, **options)

    return HarnessModel()


def rolling_windows(tokens: Sequence[int], prefix: Sequence[int], longest: int) -> list[Window]:
    """Windows that score every token once, each with as much context as `longest` scored and read positions allow.

    The first is led by `prefix`; the last, when it is short, reads earlier tokens again as context.
    """
    padded = [*prefix, *tokens]
    windows = []
    for start in range(0, len(tokens), longest):
        end = min(start + longest, len(tokens))
        last = len(prefix) + end
        windows.append(Window(padded[max(0, last - longest - 1) : last], end - start))
    return windows


def _by_settings(requests: Sequence[Request]) -> Iterator[tuple[dict[str, Any], list[int]]]:
    groups: dict[str, tuple[dict[str, Any], list[int]]] = {}
    for i, request in enumerate(requests):
        groups.setdefault(repr(sorted(request.args[1].items())), (dict(request.args[1]), []))[1].append(i)
    yield from groups.values()


def _bucket(length: int) -> int:
    return max(SHORTEST_BUCKET, 1 << (length - 1).bit_length())


def _score_batch(windows: Sequence[Window], n_rows: int) -> Batch:
    length = _bucket(max(len(window.tokens) for window in windows) - 1)
    input_ids = np.zeros((n_rows, length), np.int32)
    targets, segment_ids = np.zeros_like(input_ids), np.zeros_like(input_ids)
    mask = np.zeros((n_rows, length), bool)
    for row, (tokens, n_scored) in enumerate(windows):
        n = len(tokens) - 1
        input_ids[row, :n], targets[row, :n], segment_ids[row, :n] = tokens[:-1], tokens[1:], 1
        mask[row, n - n_scored : n] = True
    return Batch(input_ids=input_ids, targets=targets, target_mask=mask, segment_ids=segment_ids)


def _make_score_step(pretrained: Pretrained, attention: str | None) -> Callable[..., dict[str, jax.Array]]:
    def score_step(params: dict[str, Any], batch: Batch) -> dict[str, jax.Array]:
        _, per_token = forward_with_loss(pretrained.model, params, batch, attention=attention)
        return {"nll": jnp.sum(per_token.nll, axis=1), "correct": jnp.sum(per_token.correct, axis=1)}

    return jax.jit(score_step)
