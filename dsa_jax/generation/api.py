"""Generation: prefill in chunks, then one token per step for all rows at once."""

import contextlib
import operator
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsa_jax.checkpoints.pretrained import Pretrained
from dsa_jax.config import ConfigError, ModelConfig
from dsa_jax.config.checks import shown
from dsa_jax.generation.pages import PageAllocator, make_block_table
from dsa_jax.generation.programs import Mode, Sampling, State, compiled, decode, prefill, state_shardings
from dsa_jax.model import Transformer
from dsa_jax.model.attention.cache import Cache
from dsa_jax.model.attention.check import check_request
from dsa_jax.model.outputs import AttentionRequest

SMALLEST_CHUNK, PREFILL_CHUNK = 16, 512


class Timings(NamedTuple):
    """Times of a generation.

    Fields: seconds of each phase, compilation apart; `prefill_tokens` all prompt tokens; `decode_tokens` new tokens except the
    first of each row, which prefill yields; `decode_steps` steps of the whole batch; `cache_bytes` size of the KV cache.
    """

    compile_seconds: float = 0.0
    prefill_seconds: float = 0.0
    prefill_tokens: int = 0
    decode_seconds: float = 0.0
    decode_tokens: int = 0
    decode_steps: int = 0
    cache_bytes: int = 0

    @property
    def prefill_tokens_per_second(self) -> float:
        """0 where nothing was run."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """0 where nothing was run."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


class GenerateOutput(NamedTuple):
    """`token_ids` of each prompt's continuation, prompt excluded; a stop token that ended it is its last."""

    token_ids: list[list[int]]
    timings: Timings


def generate(
    pretrained: Pretrained,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    attention: str | None = None,
    seed: int = 0,
    stop_tokens: Sequence[int] | None = None,
    cache_dtype: str | None = None,
    page_size: int | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    on_token: Callable[[int, int], object] | None = None,
) -> GenerateOutput:
    """Continue every prompt, all rows together.

    Args:
        pretrained: model and parameters; of its tokenizer only the end-of-text token is used. With parameters on a mesh the
            model runs there.
        prompts: token ids; lengths may differ. An empty prompt starts from the model's `bos_token_id`.
        max_new_tokens: per row; 0 gives empty continuations.
        temperature: 0 takes the most probable token (ties to the lower id), else the logits are divided by it.
        top_p: draw from the smallest set of tokens that holds at least this probability.
        top_k: draw from this many of the most probable tokens, before `top_p`; 0 for no limit.
        attention: "dense", "sparse", ...; None is as the checkpoint was trained.
        seed: of the draws. Row i draws from (seed, i, step), independent of the other rows.
        stop_tokens: ids that end a row; None is `pretrained.stop_tokens`.
        cache_dtype: "float32", "bfloat16" or "fp8"; None is the dtype of the activations.
        page_size: tokens per page of a paged KV cache, in which a row has only the pages it needs; None is contiguous.
        prefill_chunk: prompt tokens processed at a time; bounds the memory of prefill.
        on_token: called with (row, token) as soon as a token is known; the row ends with it where True is returned.

    Raises:
        ConfigError: (a ValueError) for arguments that do not fit the model or make no sense.
    """
    config, model = pretrained.config, pretrained.model
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, pretrained.params)
    request = AttentionRequest(model.config.attention.mode if attention is None else attention)
    try:
        check_request(model.config, request, cached=True)
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(str(error)) from error
    max_new_tokens, seed, top_k = (
        _whole(name, value) for name, value in (("max_new_tokens", max_new_tokens), ("seed", seed), ("top_k", top_k))
    )
    prefill_chunk = _whole("prefill_chunk", prefill_chunk)
    if on_token is not None and not callable(on_token):
        raise ConfigError(f"on_token is {on_token!r}; expected a function of (row, token).")
    if page_size is not None:
        page_size = _whole("page_size", page_size)
    stop = pretrained.stop_tokens if stop_tokens is None else _stop_tokens(stop_tokens)
    temperature, top_p = _number("temperature", temperature), _number("top_p", top_p)
    rows = _checked_prompts(prompts, config, max_new_tokens)
    _check_numbers(temperature, top_p, top_k, seed, prefill_chunk)
    if max_new_tokens == 0:
        return GenerateOutput([[] for _ in rows], Timings())

    sampling = Sampling(jnp.uint32(seed), jnp.float32(temperature), jnp.float32(top_p), jnp.asarray(stop, jnp.int32))
    # The last new token of a row is never read again, so it needs no slot.
    needs = [len(row) + max_new_tokens - 1 for row in rows]
    cache = new_cache(model, needs, cache_dtype, page_size, with_index_keys=request.by_indexer)
    state = State(cache, jnp.zeros(len(rows), jnp.int32), jnp.ones(len(rows), bool), jnp.zeros((), jnp.int32))
    mode = Mode(request.attention, samples=temperature > 0.0, nucleus=top_p < 1.0, top_k=top_k if temperature > 0.0 else 0)

    sharding = jax.tree.leaves(params)[0].sharding
    mesh: Any = sharding.mesh if isinstance(sharding, jax.sharding.NamedSharding) else None
    everywhere = sharding if mesh is None else jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    sampling, chunks = jax.device_put((sampling, _chunks(rows, prefill_chunk)), everywhere)
    state = jax.device_put(state, everywhere if mesh is None else state_shardings(state, mesh))
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        run_prefill, seconds = compiled(prefill, model, mode, params, sampling, state, *chunks[0])
        run_decode, more_seconds = compiled(decode, model, mode, params, sampling, state)
    timings = Timings(
        compile_seconds=seconds + more_seconds, prefill_tokens=sum(map(len, rows)), cache_bytes=state.cache.n_bytes
    )

    begin = time.perf_counter()
    for chunk in chunks:
        state = run_prefill(params, sampling, state, *chunk)
    record = _Record(len(rows), frozenset(stop), on_token)
    record.add(np.asarray(state.tokens))
    timings = timings._replace(prefill_seconds=time.perf_counter() - begin)

    begin, steps = time.perf_counter(), 0
    while record.open_rows and steps + 1 < max_new_tokens:
        state = run_decode(params, sampling, state)
        record.add(np.asarray(state.tokens))
        steps += 1
    timings = timings._replace(
        decode_seconds=time.perf_counter() - begin,
        decode_steps=steps,
        decode_tokens=sum(map(len, record.tokens)) - len(rows),
    )
    return GenerateOutput(record.tokens, timings)


class _Record:
    """The new tokens of each row so far, and the rows that have not ended."""

    def __init__(self, n_rows: int, stop: frozenset[int], on_token: Callable[[int, int], object] | None) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(n_rows)]
        self.open_rows = list(range(n_rows))
        self._stop = stop
        self._on_token = on_token

    def add(self, tokens: np.ndarray) -> None:
        """Take the next token of every open row."""
        self.open_rows = [row for row in self.open_rows if not self._take(row, int(tokens[row]))]

    def _take(self, row: int, token: int) -> bool:
        """Take the next token of a row; whether the row ends with it."""
        self.tokens[row].append(token)
        is_ended = self._on_token is not None and self._on_token(row, token) is True
        return is_ended or token in self._stop


def _whole(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ConfigError(f"{name} is {value!r}; expected a whole number.") from None


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, str):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{name} is {shown(value)}; expected a number.") from None


def _stop_tokens(tokens: Any) -> tuple[int, ...]:
    if isinstance(tokens, str) or not np.iterable(tokens):
        raise ConfigError(f"stop_tokens is {tokens!r}; expected a list of token ids.")
    ids = tuple(_whole("stop_tokens", token) for token in tokens)
    if wrong := [token for token in ids if not -(2**31) <= token < 2**31]:
        raise ConfigError(f"stop_tokens holds {wrong[0]}; expected token ids, which fit 32 bits.")
    return ids


def _checked_prompts(prompts: Any, config: ModelConfig, max_new_tokens: int) -> list[np.ndarray]:
    if not isinstance(prompts, Sequence | np.ndarray | jax.Array):
        raise ConfigError(f"prompts is a {type(prompts).__name__}; expected a list of lists of token ids.")
    if isinstance(prompts, str) or any(isinstance(prompt, str) for prompt in prompts):
        raise ConfigError(
            "prompts hold text; expected lists of token ids. Encode them with pretrained.tokenizer.encode_prompt."
        )
    if len(prompts) == 0:
        raise ConfigError("prompts is empty; expected at least one list of token ids.")
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}; expected 0 or more.")
    rows = []
    for i, prompt in enumerate(prompts):
        try:
            ids = np.asarray(prompt)
        except ValueError:
            raise ConfigError(f"prompts[{i}] is no list of token ids: its entries differ in shape.") from None
        if ids.size == 0:
            if config.bos_token_id < 0:
                raise ConfigError(f"prompts[{i}] is empty and the model has no bos_token_id to start from. Give it a token.")
            ids = np.array([config.bos_token_id])
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise ConfigError(f"prompts[{i}] is no list of token ids: shape {list(ids.shape)}, dtype {ids.dtype}.")
        wrong = ids[(ids < 0) | (ids >= config.vocab_size)]
        if wrong.size:
            raise ConfigError(
                f"prompts[{i}] holds token id {wrong[0]}; expected ids from 0 to {config.vocab_size - 1}, which the model has "
                "embeddings for. Encode the text with pretrained.tokenizer.encode_prompt."
            )
        if len(ids) + max_new_tokens > config.max_positions:
            raise ConfigError(
                f"prompts[{i}] has {len(ids)} tokens, which with max_new_tokens {max_new_tokens} is more than the model's "
                f"max_positions ({config.max_positions}). Shorten the prompt or ask for fewer tokens."
            )
        rows.append(ids.astype(np.int32))
    return rows


def _check_numbers(temperature: float, top_p: float, top_k: int, seed: int, prefill_chunk: int) -> None:
    if not 0.0 <= temperature <= float(np.finfo(np.float32).max):
        raise ConfigError(f"temperature is {temperature}; expected 0 (greedy) or a positive number, finite in float32.")
    if not 0.0 < top_p <= 1.0:
        raise ConfigError(f"top_p is {top_p}; expected a probability above 0 and at most 1 (no limit).")
    if top_k < 0:
        raise ConfigError(f"top_k is {top_k}; expected a number of tokens, or 0 (no limit).")
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed is {seed}; expected a whole number from 0 to 2**32 - 1.")
    if prefill_chunk < 1:
        raise ConfigError(f"prefill_chunk is {prefill_chunk}; expected at least 1.")


def new_cache(
    model: Transformer, needs: Sequence[int], dtype: str | None, page_size: int | None, *, with_index_keys: bool
) -> Cache:
    """An empty cache with `needs` tokens for each row; the other arguments are those of `generate` and `init_cache`."""
    if page_size is None:
        return model.init_cache(len(needs), _rounded(max(needs)), dtype=dtype, with_index_keys=with_index_keys)
    if page_size < 1:
        raise ConfigError(f"page_size is {page_size}; expected at least 1, or None for a contiguous cache.")
    width = _rounded(-(-max(needs) // page_size))
    n_pages = _rounded(sum(-(-need // page_size) for need in needs))
    allocator = PageAllocator(n_pages, page_size)
    return model.init_cache(
        len(needs),
        width * page_size,
        dtype=dtype,
        page_size=page_size,
        n_pages=n_pages,
        block_table=make_block_table([allocator.allocate(need) for need in needs], width),
        with_index_keys=with_index_keys,
    )


def _rounded(n: int) -> int:
    """`n` rounded up by at most an eighth: requests of similar sizes share a compiled program."""
    step = max(1, 1 << max(0, n.bit_length() - 4))
    return -(-n // step) * step


def chunk_size(longest: int, prefill_chunk: int = PREFILL_CHUNK) -> int:
    """Tokens of a chunk of prompts of which the longest has `longest`."""
    return min(prefill_chunk, max(SMALLEST_CHUNK, 1 << (longest - 1).bit_length()))


def _chunks(rows: Sequence[np.ndarray], prefill_chunk: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The prompts as chunks (input_ids [B, T], n_new [B]) of one shape, padding with token 0."""
    lengths = np.array([len(row) for row in rows])
    size = chunk_size(int(lengths.max()), prefill_chunk)
    n_chunks = -(-int(lengths.max()) // size)
    padded = np.zeros((len(rows), n_chunks * size), np.int32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return [
        (padded[:, first : first + size], np.clip(lengths - first, 0, size).astype(np.int32))
        for first in range(0, n_chunks * size, size)
    ]
