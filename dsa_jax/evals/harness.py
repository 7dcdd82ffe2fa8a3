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
from dsa_jax.extras import MissingExtraError
from dsa_jax.generation import generate
from dsa_jax.train.loss import forward_with_loss

_LOG = logging.getLogger(__name__)

SHORTEST_BUCKET = 64
"""Rows are padded to this many tokens or the next power of two, so that few lengths are compiled."""

DEFAULT_NEW_TOKENS = 256
"""Length of a generation whose request does not say `max_gen_toks`."""


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
        add_bos: bool = False,
    ) -> None:
        """Score with `pretrained`.

        Args:
            pretrained: needs a tokenizer.
            attention: "dense", "sparse", ...; None is as the checkpoint was trained.
            batch_size: rows per forward pass.
            max_length: longest row in tokens, context and continuation together; longer ones lose their beginning. None: the
                model's `max_positions`.
            add_bos: start every context with the model's `bos_token_id`, as its tokenizer would for plain text.

        Raises:
            ConfigError: without a tokenizer, or with `add_bos` and no `bos_token_id`.
        """
        if pretrained.tokenizer is None:
            raise ConfigError("the checkpoint has no tokenizer; expected a tokenizer.json beside its weights.")
        if add_bos and pretrained.config.bos_token_id < 0:
            raise ConfigError("add_bos is True, but the checkpoint names no bos_token_id. Pass add_bos=False.")
        self.pretrained = pretrained
        self.tokenizer = pretrained.tokenizer
        self.attention = attention
        self.rows_per_batch = batch_size
        self.longest = max_length or pretrained.config.max_positions
        self.add_bos = add_bos
        self._step = _make_score_step(pretrained, attention)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: begin-of-text, or end-of-text where there is none."""
        bos = self.pretrained.config.bos_token_id
        return bos if bos >= 0 else self.tokenizer.end_of_text_id

    def loglikelihood(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[Scored]:
        """log p(continuation | context) of each request `(context, continuation)`."""
        del disable_tqdm
        return self.score([self._pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[float]:
        """log p(text) of each request `(text,)`; every token is scored once, in windows of at most `max_length`."""
        del disable_tqdm
        windows = [rolling_windows(self._encode(r.args[0]), self.prefix_token_id, self.longest) for r in requests]
        scores = iter(self.score([window for text in windows for window in text]))
        return [float(sum(next(scores).loglikelihood for _ in text)) for text in windows]

    def generate_until(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[str]:
        """Text of each request `(context, settings)` up to the first of `settings["until"]`, which is left out.

        Settings read: `until`, `max_gen_toks`, `do_sample`, `temperature`, `top_p`; greedy unless `do_sample` is true or a
        positive temperature is given.

        Raises:
            ValueError: for a setting that is not known here.
        """
        del disable_tqdm
        results = [""] * len(requests)
        for settings, places in _by_settings(requests):
            for start in range(0, len(places), self.rows_per_batch):
                chosen = places[start : start + self.rows_per_batch]
                for place, text in zip(chosen, self._generate([requests[i].args[0] for i in chosen], settings), strict=True):
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
        return [int(token) for token in self.tokenizer.encode(text)]

    def _context(self, text: str) -> list[int]:
        tokens = self._encode(text)
        return [self.pretrained.config.bos_token_id, *tokens] if self.add_bos else tokens

    def _pair(self, context: str, continuation: str) -> Window:
        # A space at the end of the context belongs to the first word after it, as tokenizers write it.
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        before = self._context(stripped) if stripped else []
        whole = self._context(stripped + continuation) if stripped else self._encode(continuation)
        scored = whole[len(before) :]
        if not scored:
            raise ValueError(f"the continuation {continuation!r} adds no token to its context; expected some text to score.")
        before = before or [self.prefix_token_id]
        if len(scored) > self.longest:
            raise ValueError(
                f"a continuation has {len(scored)} tokens, more than max_length ({self.longest}). Raise max_length."
            )
        return Window([*before, *scored][-(self.longest + 1) :], len(scored))

    def _generate(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        known = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}
        if unknown := sorted(set(settings) - known):
            raise ValueError(f"generation settings {', '.join(unknown)} are not known; expected {', '.join(sorted(known))}.")
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        new_tokens = int(settings.get("max_gen_toks", DEFAULT_NEW_TOKENS))
        temperature = float(settings.get("temperature") or 0.0)
        if not settings.get("do_sample", temperature > 0.0):
            temperature = 0.0
        room = self.longest - new_tokens
        if room < 1:
            raise ValueError(f"max_gen_toks is {new_tokens}; expected less than max_length ({self.longest}).")
        prompts = [(self._context(text) or [self.prefix_token_id])[-room:] for text in contexts]
        output = generate(
            self.pretrained,
            prompts,
            max_new_tokens=new_tokens,
            temperature=temperature,
            top_p=float(settings.get("top_p", 1.0)),
            attention=self.attention,
            # A run trained here ends its documents with the tokenizer's own token.
            stop_tokens=self.pretrained.config.eos_token_ids or (self.tokenizer.end_of_text_id,),
        )
        return [cut_at(self.tokenizer.decode(tokens), until) for tokens in output.token_ids]


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


def rolling_windows(tokens: Sequence[int], prefix: int, longest: int) -> list[Window]:
    """Windows that score every token once, each with as much context as `longest` scored and read positions allow.

    The first is led by `prefix`; the last, when it is short, reads earlier tokens again as context.
    """
    padded = [prefix, *tokens]
    windows = []
    for start in range(0, len(tokens), longest):
        end = min(start + longest, len(tokens))
        windows.append(Window(padded[max(0, end - longest) : end + 1], end - start))
    return windows


def cut_at(text: str, until: Sequence[str]) -> str:
    """`text` before the first occurrence of any of `until`; empty strings in it count for nothing."""
    ends = [place for stop in until if stop and (place := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


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
