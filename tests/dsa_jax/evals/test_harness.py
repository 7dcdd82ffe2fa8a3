from typing import NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsa_jax.checkpoints.pretrained import Pretrained
from dsa_jax.config import ConfigError
from dsa_jax.data import ByteTokenizer
from dsa_jax.evals.harness import HarnessScorer, lm_eval_model, rolling_windows
from tests.dsa_jax.model.small import built, forward, small_config


class Instance(NamedTuple):
    args: tuple


@pytest.fixture(scope="module")
def pretrained():
    model, params = built("gqa", vocab_size=257, topk=6)
    config = small_config("gqa", vocab_size=257, topk=6)
    return Pretrained(config, model, params, ByteTokenizer())


@pytest.fixture(scope="module", params=["dense", "sparse"])
def scorer(request, pretrained):
    return HarnessScorer(pretrained, attention=request.param, batch_size=2)


def log_probs(pretrained, tokens, attention):
    """log p(tokens[i + 1] | tokens[:i + 1]) for every i, from one unpadded forward pass."""
    ids = np.asarray([tokens], np.int32)
    logits = forward(pretrained.model, pretrained.params, ids, attention=attention).logits[0, :-1]
    return np.asarray(jax.nn.log_softmax(logits))


def test_loglikelihood_is_that_of_the_continuation_alone(pretrained, scorer):
    """Three requests in batches of two, of different lengths; a trailing space moves to the continuation; no context."""
    requests = [Instance(("the cat", " sat")), Instance(("on the ", "mat and looked around")), Instance(("", "x"))]
    expected, greedy = [], []
    for context, continuation in [("the cat", " sat"), ("on the", " mat and looked around"), ("", "x")]:
        before = list(context.encode()) or [256]
        tokens = [*before, *continuation.encode()]
        rows = log_probs(pretrained, tokens, scorer.attention)[len(before) - 1 :]
        scored = tokens[len(before) :]
        expected.append(rows[np.arange(len(scored)), scored].sum())
        greedy.append(bool((rows.argmax(-1) == scored).all()))
    results = scorer.loglikelihood(requests)
    np.testing.assert_allclose([r.loglikelihood for r in results], expected, rtol=1e-4)
    assert [r.is_greedy for r in results] == greedy


def test_greedy_continuation_is_recognised(pretrained, scorer):
    context = "abcdefgh"
    first = int(log_probs(pretrained, [*context.encode(), 0], scorer.attention)[-1].argmax())
    window = scorer._pair(context, "?")._replace(tokens=[*context.encode(), first])
    assert scorer.score([window])[0].is_greedy
    assert not scorer.score([window._replace(tokens=[*context.encode(), (first + 1) % 256])])[0].is_greedy


def test_rolling_loglikelihood_scores_every_token_once(pretrained):
    """A text of 20 bytes in windows of 8: 8, 8, and 4 that read four earlier ones again."""
    scorer = HarnessScorer(pretrained, attention="dense", batch_size=2, max_length=8)
    text = "twenty bytes of text"
    padded = [256, *text.encode()]
    total = 0.0
    for read_from, score_from, end in [(0, 1, 9), (8, 9, 17), (12, 17, 21)]:
        rows = log_probs(pretrained, padded[read_from:end], "dense")
        total += sum(rows[i - read_from - 1, padded[i]] for i in range(score_from, end))
    np.testing.assert_allclose(scorer.loglikelihood_rolling([Instance((text,))]), [total], rtol=1e-4)


@given(n_tokens=st.integers(0, 40), n_prefix=st.integers(1, 2), longest=st.integers(1, 12))
def test_rolling_windows_cover_the_text(n_tokens, n_prefix, longest):
    tokens = list(range(1, n_tokens + 1))
    windows = rolling_windows(tokens, [0] * n_prefix, longest)
    assert [token for window in windows for token in window.tokens[-window.n_scored :]] == tokens
    assert all(len(window.tokens) <= longest + 1 and window.n_scored < len(window.tokens) for window in windows)


def test_long_context_loses_its_beginning(pretrained):
    short = HarnessScorer(pretrained, attention="dense", max_length=8)
    assert short._pair("0123456789", "abc") == (list(b"456789abc"), 3)
    with pytest.raises(ValueError, match="max_length"):
        short._pair("a", "0123456789")


def test_generation_stops_at_the_first_stop_string(scorer):
    free = scorer.generate_until([Instance(("abc", {"until": [], "max_gen_toks": 6}))])[0]
    assert free
    requests = [
        Instance(("abc", {"until": [free[1]], "max_gen_toks": 6})),
        Instance(("abc", {"until": [], "max_gen_toks": 6})),
    ]
    assert scorer.generate_until(requests) == [free[: free.find(free[1])], free]
    with pytest.raises(ValueError, match="num_beams"):
        scorer.generate_until([Instance(("abc", {"num_beams": 4}))])


def test_generation_ends_where_a_document_does(pretrained):
    """A model trained here has no end tokens of its own: its documents end with the tokenizer's."""
    tokens = log_probs(pretrained, [*b"abc", 0], "dense")[-1]
    ended = int(np.argmax(tokens))
    tokenizer = ByteTokenizer()
    tokenizer.end_of_text_id = ended
    scorer = HarnessScorer(pretrained._replace(tokenizer=tokenizer), attention="dense", batch_size=1)
    (text,) = scorer.generate_until([Instance(("abc", {"until": [], "max_gen_toks": 6}))])
    assert text == tokenizer.decode([ended])


def test_missing_parts_are_named(pretrained):
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        HarnessScorer(pretrained._replace(tokenizer=None))
    with pytest.raises(ConfigError, match="bos_token_id"):
        HarnessScorer(pretrained, add_bos=True)
    with pytest.raises(ImportError, match="pip install lm-eval"):
        lm_eval_model(pretrained)
