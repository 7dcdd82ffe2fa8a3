"""Held-out text cut into prompts and continued, with a model that writes one letter."""

import dataclasses

import pytest

from dsa_jax.config import DataConfig, EvalConfig
from dsa_jax.data import make_eval_data
from dsa_jax.evals.samples import make_samples, sample_tokens, wants_samples


def data_of(path, text):
    path.write_text(text)
    config = DataConfig(recall_fraction=0.0)
    config.text.path = str(path)
    return make_eval_data(config, 0, 300)


@pytest.mark.parametrize(("text_len", "n_new"), [(256, 48), (40, 20), (1, 1)])
def test_a_row_ends_where_its_text_would_go_on(text_len, n_new, tmp_path):
    data = data_of(tmp_path / "text.txt", "".join(f"Line {i} of the text.\n" for i in range(400)))
    settings, seen = EvalConfig(text_len=text_len, samples=2), []

    def continued(prompts, n):
        seen.append((prompts, n))
        return [[ord("a")] * n for _ in prompts]

    samples = make_samples({"dense": continued, "sparse": continued}, data, settings)
    assert sample_tokens(settings) == n_new and seen[0] == seen[1]
    assert len(samples) == (0 if text_len == 1 else 2)
    held_out = data.tokenizer.decode(data.text.held_out.tokens.tolist())
    for sample, prompt in zip(samples, seen[0][0], strict=True):
        assert sample.prompt + sample.text in held_out and len(sample.text) == n_new
        assert len(prompt) + n_new <= text_len and data.tokenizer.decode(prompt).endswith(sample.prompt)
        assert sample.continuations == {"dense": "a" * n_new, "sparse": "a" * n_new}


def test_samples_are_made_of_text_that_is_evaluated(tmp_path):
    settings, data = EvalConfig(), data_of(tmp_path / "text.txt", "A line.\n" * 400)
    assert wants_samples(data, settings)
    assert not wants_samples(data, dataclasses.replace(settings, samples=0))
    assert not wants_samples(data, dataclasses.replace(settings, text_sequences=0))
    assert not wants_samples(make_eval_data(DataConfig(recall_fraction=1.0), 0, 700), settings)
