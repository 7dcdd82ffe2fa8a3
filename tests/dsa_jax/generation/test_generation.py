"""Generated text is what the full forward pass would have written, token by token."""

import functools

import jax
import numpy as np
import pytest

import dsa_jax.generation.programs as programs
from dsa_jax.checkpoints.pretrained import Pretrained
from dsa_jax.data import ByteTokenizer
from dsa_jax.generation import generate
from dsa_jax.generation.api import _checked_prompts, _number, _stop_tokens, _whole
from tests.dsa_jax.model.small import VOCAB, built, forward, small_config

MODELS = {
    "gqa": {"kind": "gqa_qwen"},
    "mla": {"kind": "mla"},
    "mla-moe-shared": {"kind": "mla_plain", "moe": True, "layer_types": ("full", "shared", "full")},
}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [8, 9], [7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4, 3, 3, 8, 3, 2, 7]]
NEW = 7


@functools.cache
def pretrained(name, **fields):
    fields = MODELS[name] | {"tie_embeddings": False} | fields
    model, params = built(**fields)
    return Pretrained(small_config(**fields), model, params, None)


@functools.cache
def by_full_passes(name, attention):
    """Greedy continuations of `PROMPTS`, each token from a forward pass over all tokens before it."""
    loaded = pretrained(name)
    ids = np.zeros((len(PROMPTS), 24), np.int32)
    lengths = np.array([len(prompt) for prompt in PROMPTS])
    for row, prompt in enumerate(PROMPTS):
        ids[row, : len(prompt)] = prompt
    for _ in range(NEW):
        logits = np.asarray(forward(loaded.model, loaded.params, ids, attention=attention).logits)
        for row, length in enumerate(lengths):
            top = np.sort(logits[row, length - 1])[-2:]
            assert top[1] - top[0] > 1e-4  # no near tie that rounding could decide
            ids[row, length] = logits[row, length - 1].argmax()
        lengths += 1
    return [ids[row, len(prompt) : len(prompt) + NEW].tolist() for row, prompt in enumerate(PROMPTS)]


WAYS = {
    "random-in-chunks": {"attention": "random", "prefill_chunk": 5},
    "dense-contiguous": {"attention": "dense"},
    "sparse-contiguous": {"attention": "sparse"},
    "sparse-paged-in-chunks": {"attention": "sparse", "page_size": 4, "prefill_chunk": 5},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_equals_repeated_full_passes(name, way):
    result = generate(pretrained(name), PROMPTS, max_new_tokens=NEW, **WAYS[way])
    expected = by_full_passes(name, WAYS[way]["attention"])
    assert result.token_ids == expected
    assert len({token for text in expected for token in text}) > NEW  # a text that says something


def test_the_modes_differ_so_the_tests_above_see_which_one_ran():
    texts = [by_full_passes("mla", attention) for attention in ("dense", "sparse")]
    assert texts[0] != texts[1]


def sampled(prompts, **options):
    return generate(pretrained("mla"), prompts, max_new_tokens=NEW, **{"temperature": 0.9, "top_p": 0.95, "seed": 5} | options)


def test_a_rows_text_does_not_depend_on_the_other_rows():
    together = sampled(PROMPTS).token_ids
    others = sampled([PROMPTS[0], PROMPTS[2], [1] * 9]).token_ids
    assert together[0] == others[0] and together[1] != others[1]
    assert sampled(PROMPTS).token_ids == together
    assert sampled(PROMPTS, seed=6).token_ids != together


def test_no_new_shapes_no_new_programs(monkeypatch):
    compiled = []
    real = programs._compile.__wrapped__
    monkeypatch.setattr(programs, "_compile", functools.lru_cache(lambda *args: compiled.append(args[0]) or real(*args)))
    first = sampled(PROMPTS)
    assert compiled == [programs.prefill, programs.decode]  # one program each, whatever the position
    assert first.timings.decode_steps == NEW - 1
    again = sampled(PROMPTS, temperature=0.5, top_p=0.5, seed=9, stop_tokens=())
    assert len(compiled) == 2 and again.timings.compile_seconds < first.timings.compile_seconds


def test_rows_end_at_their_stop_token_and_leave_the_others_alone():
    plain = by_full_passes("gqa", "sparse")
    stop = plain[0][2]
    expected = [text[: text.index(stop) + 1] if stop in text else text for text in plain]
    heard = []
    result = generate(
        pretrained("gqa"), PROMPTS, max_new_tokens=NEW, attention="sparse", stop_tokens=[stop, VOCAB + 5, VOCAB + 6],
        on_token=lambda *pair: heard.append(pair),
    )  # fmt: skip
    assert result.token_ids == expected and len(expected[0]) <= 3
    assert [[token for row, token in heard if row == i] for i in range(3)] == expected
    assert result.timings.decode_tokens == sum(map(len, expected)) - 3
    assert result.timings.prefill_tokens == sum(map(len, PROMPTS))


def test_the_loop_ends_when_all_rows_have():
    first_tokens = [text[0] for text in by_full_passes("gqa", "sparse")]
    first = generate(pretrained("gqa"), PROMPTS, max_new_tokens=NEW, attention="sparse", stop_tokens=first_tokens)
    assert first.token_ids == [[token] for token in first_tokens] and first.timings.decode_steps == 0
    assert first.timings.decode_tokens_per_second == 0.0 and first.timings.prefill_tokens_per_second > 0.0


def test_a_row_ends_where_the_caller_says_so():
    plain = by_full_passes("gqa", "sparse")
    ends = {0: 1, 1: 3, 2: 2}
    heard = [0, 0, 0]

    def on_token(row, token):
        heard[row] += 1
        return heard[row] == ends[row]

    result = generate(pretrained("gqa"), PROMPTS, max_new_tokens=NEW, attention="sparse", on_token=on_token)
    assert result.token_ids == [plain[row][: ends[row]] for row in range(3)] and result.timings.decode_steps == 2
    with_text = generate(pretrained("gqa"), PROMPTS, max_new_tokens=NEW, attention="sparse", on_token=lambda *_: "text")
    assert with_text.token_ids == plain


def test_the_most_probable_token_alone_is_the_greedy_text():
    assert sampled(PROMPTS, top_k=1, attention="sparse").token_ids == by_full_passes("mla", "sparse")
    assert sampled(PROMPTS, top_k=VOCAB).token_ids == sampled(PROMPTS).token_ids


def test_the_models_own_stop_and_start_tokens_are_the_default():
    stop = by_full_passes("gqa", "sparse")[0][2]
    loaded = pretrained("gqa", eos_token_ids=(stop,), bos_token_id=PROMPTS[1][0])
    result = generate(loaded, [PROMPTS[0], [], PROMPTS[1][:1]], max_new_tokens=NEW, attention="sparse")
    assert result.token_ids[0] == by_full_passes("gqa", "sparse")[0][:3]
    assert result.token_ids[1] == result.token_ids[2]
    tokenizer = ByteTokenizer()
    tokenizer.end_of_text_id = by_full_passes("gqa", "sparse")[0][1]
    result = generate(loaded._replace(tokenizer=tokenizer), [PROMPTS[0], [], [8]], max_new_tokens=NEW, attention="sparse")
    assert result.token_ids[0] == by_full_passes("gqa", "sparse")[0][:2]


def test_no_new_tokens_asked_for():
    result = generate(pretrained("gqa"), PROMPTS, max_new_tokens=0)
    assert result.token_ids == [[], [], []] and result.timings.compile_seconds == 0.0


WRONG = {
    "no-prompts": ({"prompts": []}, "prompts is empty"),
    "empty-prompt": ({"prompts": [[1], []]}, r"prompts\[1\] is empty and the model has no bos_token_id"),
    "outside-vocabulary": ({"prompts": [[1, VOCAB]]}, rf"prompts\[0\] holds token id {VOCAB}; expected ids from 0 to 63"),
    "negative-token": ({"prompts": [[-1]]}, "token id -1"),
    "not-integers": ({"prompts": [np.ones((1, 3), int)]}, r"no list of token ids: shape \[1, 3\]"),
    "too-long": ({"max_new_tokens": 4096}, r"more than the model's max_positions \(4096\)"),
    "negative-length": ({"max_new_tokens": -1}, "max_new_tokens is -1"),
    "cold": ({"temperature": -0.5}, "temperature is -0.5"),
    "not-a-temperature": ({"temperature": float("nan")}, "temperature is nan"),
    "too-hot": ({"temperature": 1e39}, "temperature is 1e.39; expected .* finite in float32"),
    "no-mode": ({"attention": ""}, "attention is ''; expected one of dense, sparse"),
    "no-mass": ({"top_p": 0.0}, r"top_p is 0.0"),
    "too-much-mass": ({"top_p": 1.5}, r"top_p is 1.5"),
    "fewer-than-none": ({"top_k": -1}, "top_k is -1"),
    "seed": ({"seed": -1}, "seed is -1"),
    "stop-token": ({"stop_tokens": [2**40]}, "stop_tokens holds 1099511627776; expected token ids"),
    "chunk": ({"prefill_chunk": 0}, "prefill_chunk is 0"),
    "page": ({"page_size": 0}, "page_size is 0"),
    "dtype": ({"cache_dtype": "int4"}, "cache dtype is 'int4'; expected one of float32, bfloat16, fp8"),
    "mode": ({"attention": "topk"}, "attention is 'topk'; expected one of dense, sparse"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_say_what_was_expected(case):
    options, message = WRONG[case]
    arguments = {"prompts": [[1, 2]], "max_new_tokens": 3} | options
    with pytest.raises(ValueError, match=message):
        generate(pretrained("gqa"), arguments.pop("prompts"), **arguments)


def test_text_in_place_of_tokens():
    # Past `generate`, whose own types are checked in a test run.
    with pytest.raises(ValueError, match="prompts hold text; expected lists of token ids"):
        _checked_prompts(["hello"], small_config("gqa"), 3)
    with pytest.raises(ValueError, match="prompts is a NoneType; expected a list of lists of token ids"):
        _checked_prompts(None, small_config("gqa"), 3)


def test_whole_numbers_of_any_kind_and_no_others():
    count = _whole("max_new_tokens", np.int64(3))
    assert (type(count), count) == (int, 3)
    with pytest.raises(ValueError, match=r"max_new_tokens is 2\.5; expected a whole number"):
        _whole("max_new_tokens", 2.5)
    assert _number("top_p", np.float32(0.5)) == 0.5 and _stop_tokens(np.arange(2)) == (0, 1)
    with pytest.raises(ValueError, match=r"temperature is '1'; expected a number"):
        _number("temperature", "1")
    with pytest.raises(ValueError, match=r"stop_tokens is 3; expected a list of token ids"):
        _stop_tokens(3)


def test_parameters_as_numpy_arrays():
    loaded = pretrained("gqa")
    by_numpy = loaded._replace(params=jax.tree.map(np.asarray, loaded.params))
    run = lambda loaded: generate(loaded, PROMPTS[:1], max_new_tokens=2).token_ids
    assert run(by_numpy) == run(loaded)


def test_parameters_on_a_mesh():
    loaded = pretrained("gqa")
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    spread = lambda leaf: jax.device_put(
        leaf, jax.NamedSharding(mesh, jax.P(*[None] * (leaf.ndim - 1), "tensor" if leaf.shape[-1] % 2 == 0 else None))
    )
    split = loaded._replace(params=jax.tree.map(spread, loaded.params))
    result = generate(split, PROMPTS, max_new_tokens=NEW, attention="sparse", page_size=4)
    assert result.token_ids == by_full_passes("gqa", "sparse")
