"""How requests of lm-evaluation-harness become tokens and limits, with the model's part scripted."""

import inspect

import pytest

from dsa_jax.checkpoints.pretrained import Pretrained
from dsa_jax.data import ByteTokenizer, load_tokenizer
from dsa_jax.evals import harness
from dsa_jax.evals.harness import HarnessScorer, Scored
from dsa_jax.evals.harness_settings import read_generation_settings
from dsa_jax.generation import GenerateOutput, Timings
from tests.dsa_jax.data.test_tokenizer_files import BEGINS, BOS_BEFORE, DECLARED, TURN_END, write
from tests.dsa_jax.evals.test_harness import Instance
from tests.dsa_jax.model.small import built, small_config


def scorer_of(tokenizer, *, bos=-1, **options):
    model, params = built("gqa", vocab_size=257, topk=6)
    config = small_config("gqa", vocab_size=257, topk=6, bos_token_id=bos)
    return HarnessScorer(Pretrained(config, model, params, tokenizer), **options)


@pytest.fixture
def calls(monkeypatch):
    """What `generate` was asked for; it answers every prompt with `script` until the row ends."""
    asked = []

    def scripted(pretrained, prompts, *, max_new_tokens, on_token, **options):
        asked.append({"prompts": prompts, "max_new_tokens": max_new_tokens, **options})
        rows = []
        for row in range(len(prompts)):
            tokens = asked[0]["script"][:max_new_tokens]
            ends = (n for n, token in enumerate(tokens, start=1) if on_token(row, token))
            rows.append(tokens[: next(ends, len(tokens))])
        asked[-1]["steps"] = max(map(len, rows)) - 1
        return GenerateOutput(rows, Timings())

    assert {"top_k", "seed", "on_token"} <= inspect.signature(harness.generate).parameters.keys()
    monkeypatch.setattr(harness, "generate", scripted)
    asked.append({"script": list(b"a\nb") + [97] * 300})
    return asked


def test_decoding_ends_with_the_stop_string(calls):
    scorer = scorer_of(ByteTokenizer())
    assert scorer.generate_until([Instance(("x", {"until": ["\n"], "max_gen_toks": 60}))]) == ["a"]
    assert calls[-1]["steps"] == 1
    assert scorer.generate_until([Instance(("x", {"until": "b", "max_gen_toks": 60}))]) == ["a\n"]
    assert calls[-1]["steps"] == 2
    assert scorer.generate_until([Instance(("x", {"until": None, "max_gen_toks": 4}))]) == ["a\nba"]


def test_decoding_ends_with_a_control_token(calls, tmp_path):
    tokenizer = load_tokenizer(write(tmp_path, beside=DECLARED["decoder"]))
    calls[0]["script"] = [4, 5, 44, 6, 7, 8]
    request = Instance(("w0", {"until": ["\n\n", TURN_END], "max_gen_toks": 60}))
    assert scorer_of(tokenizer).generate_until([request]) == ["w1 w2"] and calls[-1]["steps"] == 2


@pytest.mark.parametrize("parts", BEGINS.values(), ids=BEGINS)
def test_contexts_begin_as_the_tokenizer_begins_a_text(calls, tmp_path, parts):
    scorer = scorer_of(load_tokenizer(write(tmp_path, **parts)))
    for context in ("w2 w3", "<s>w2 w3"):
        scorer.generate_until([Instance((context, {"max_gen_toks": 2}))])
        assert calls[-1]["prompts"] == [[1, 5, 6]]
        assert scorer._pair(context, " w4") == ([1, 5, 6, 7], 1)
    assert scorer._pair("", "w2") == ([1, 5], 1) == scorer._pair("", "<s>w2")
    scored = []
    scorer.score = lambda windows: scored.extend(windows) or [Scored(-1.5, False) for _ in windows]
    assert scorer.loglikelihood_rolling([Instance(("<s>w2 w3",)), Instance(("w2 w3",))]) == [-1.5, -1.5]
    assert scored == [([1, 5, 6], 2)] * 2


@pytest.mark.parametrize(
    ("add_bos", "starts"), [(None, [False, True]), (True, [True, True]), (False, [False, False])], ids=["own", "yes", "no"]
)
def test_begin_of_text_by_option(tmp_path, add_bos, starts):
    plain = load_tokenizer(write(tmp_path / "plain"))
    adding = load_tokenizer(write(tmp_path / "adding", post_processor=BOS_BEFORE))
    for tokenizer, has_begin in zip((plain, adding), starts, strict=True):
        scorer = scorer_of(tokenizer, bos=1, add_bos=add_bos)
        assert scorer._context("w2") == ([1, 5] if has_begin else [5])
        assert scorer._context("<s>w2") == [1, 5] and scorer.prefix_token_id == 1


def test_settings_of_the_tasks():
    read = read_generation_settings
    neutral = {"num_beams": 1, "repetition_penalty": 1.0, "num_return_sequences": 1, "min_p": 0.0, "use_cache": True}
    plain = read({})
    assert plain == ([], None, None, 0.0, 1.0, 0, 0) and read(neutral) == plain == read(dict.fromkeys(neutral))
    assert read({"max_new_tokens": 5}).new_tokens == 5 == read({"max_gen_toks": "5", "max_new_tokens": 9}).new_tokens
    assert read({"max_tokens": 7}).new_tokens == 7
    drawn = read({"do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "seed": 4})
    assert drawn[3:] == (0.5, 0.9, 3, 4)
    assert read({"do_sample": False, "temperature": 0.5, "top_k": 3, "top_p": 0.0}) == plain
    assert read({"temperature": 1, "top_k": -1}).top_k == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4}, "num_beams is 4; expected 1"),
        ({"repetition_penalty": 1.2}, r"repetition_penalty is 1\.2; expected 1"),
        ({"guidance": 2}, "guidance are not known"),
        ({"top_k": "many", "temperature": 1.0}, "top_k is 'many'; expected a number"),
        ({"max_new_tokens": [3]}, r"max_new_tokens is \[3\]; expected a number"),
        ({"max_length": float("inf")}, "max_length is inf; expected a number"),
        ({"max_length": 3}, "max_length is 3, but a context has 4 tokens"),
        ({"max_gen_toks": 64}, r"max_gen_toks is 64; expected .* max_length \(64\)"),
        ({"max_gen_toks": -1}, "max_gen_toks is -1"),
        ({"until": 5}, "until is 5; expected a string, or a list of strings"),
        ({"until": ["\n", None]}, r"until is \['\\n', None\]; expected a string"),
        ({"until": {"\n": 1}}, "until is {.*}; expected a string, or a list"),
        ({"temperature": 10**400}, "temperature is .*; expected a number"),
    ],
)
def test_settings_that_cannot_be_followed(calls, settings, message):
    with pytest.raises(ValueError, match=message):
        scorer_of(ByteTokenizer(), max_length=64).generate_until([Instance(("abcd", settings))])


def test_limits_and_draws_reach_the_generation(calls):
    scorer = scorer_of(ByteTokenizer(), max_length=64, batch_size=2)
    sampled = {"temperature": 0.7, "do_sample": True, "top_k": 5, "top_p": 0.5, "seed": 11}
    assert scorer.generate_until([Instance(("abc", sampled | {"max_new_tokens": 2}))]) == ["a\n"]
    assert {name: calls[-1][name] for name in ("temperature", "top_k", "top_p", "seed", "max_new_tokens")} == {
        "temperature": 0.7, "top_k": 5, "top_p": 0.5, "seed": 11, "max_new_tokens": 2,
    }  # fmt: skip
    # Prompt and continuation together: contexts of different lengths have different room.
    requests = [Instance((context, {"max_length": 6})) for context in ("abc", "a", "xyz")]
    assert [len(text) for text in scorer.generate_until(requests)] == [3, 5, 3]
    assert [(len(call["prompts"]), call["max_new_tokens"]) for call in calls[-2:]] == [(2, 3), (1, 5)]
    scorer.generate_until([Instance(("a" * 90, {"max_gen_toks": 60}))])
    assert calls[-1]["prompts"] == [[97] * 4]
    scorer.generate_until([Instance(("a" * 90, {"max_length": 100}))])
    assert (calls[-1]["prompts"], calls[-1]["max_new_tokens"]) == ([[97] * 63], 1)
