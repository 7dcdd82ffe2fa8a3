"""Tasks in plain words: rows decoded and read as a person would."""

import re

import numpy as np
import pytest

from dsa_jax.config import TEXT_TASKS as NAMES
from dsa_jax.config import Config, ConfigError, DataConfig, EvalConfig
from dsa_jax.data import ByteTokenizer, make_eval_data
from dsa_jax.data.packing import make_stream
from dsa_jax.data.text_tasks import TEXT_TASKS, get_text_task, make_haystack, stack_text_rows
from dsa_jax.data.text_tasks.rows import N_DEPTHS
from dsa_jax.data.text_tasks.vocabulary import WORDS

TOKENIZER = ByteTokenizer()
LINES = [f"Line {i} of the text says nothing that anybody would ask for later.\n" for i in range(200)]


@pytest.fixture(scope="module")
def haystack():
    documents = ["".join(LINES[:90]), "".join(LINES[90:])]
    stream = make_stream([np.append(TOKENIZER.encode(text), TOKENIZER.end_of_text_id).astype(np.uint16) for text in documents])
    return make_haystack(stream, TOKENIZER)


def draw(name, haystack, *, n_rows=3, seq_len=2000, seed=0):
    return get_text_task(name).rows(TOKENIZER, haystack, np.random.default_rng(seed), n_rows=n_rows, seq_len=seq_len)


def texts(rows):
    """(whole text, answers in order) of each row."""
    batch, answers = rows
    for i in range(len(batch.input_ids)):
        numbers = answers.of_target[i]
        found = [n for n in np.unique(numbers) if n >= 0]
        whole = np.append(batch.input_ids[i], batch.targets[i][-1])
        yield TOKENIZER.decode(whole), [TOKENIZER.decode(batch.targets[i][numbers == n]) for n in found]


def test_words_are_distinct_and_none_begins_another():
    assert list(WORDS) == sorted(set(WORDS)) and len(WORDS) > 150
    assert not [(a, b) for a in WORDS for b in WORDS if a != b and b.startswith(a)]


@pytest.mark.parametrize("name", NAMES)
def test_rows_have_their_length_targets_and_groups(name, haystack):
    batch, answers = draw(name, haystack)
    assert batch.input_ids.shape == (3, 2000) and (batch.segment_ids == 1).all()
    np.testing.assert_array_equal(batch.target_mask, answers.of_target >= 0)
    assert sorted(set(answers.of_target[batch.target_mask])) == list(range(answers.groups.size))
    assert answers.groups.min() >= 0 and answers.groups.max() < TEXT_TASKS[name].n_groups
    # A target is the token that follows, so that an answer can be generated.
    row, position = np.nonzero(batch.target_mask[:, :-1])
    np.testing.assert_array_equal(batch.targets[row, position], batch.input_ids[row, position + 1])
    again, other = draw(name, haystack), draw(name, haystack, seed=1)
    np.testing.assert_array_equal(again.batch.input_ids, batch.input_ids)
    assert not np.array_equal(other.batch.input_ids, batch.input_ids)


@pytest.mark.parametrize("name", ["needle", "needle_multikey", "needle_multiquery"])
def test_the_number_asked_for_is_the_one_hidden(name, haystack):
    for text, answers in texts(draw(name, haystack)):
        hidden = dict(re.findall(r"The secret number of the (\w+) is (\d{7})\.\n", text))
        asked = re.findall(r"\nThe secret number of the (\w+) is (\d{7})(?!\d|\.)", text)
        assert [f" {hidden[word]}" for word, _ in asked] == answers
        assert len(asked) == (4 if name == "needle_multiquery" else 1)
        assert len(hidden) == {"needle": 1, "needle_multikey": 1 + 2000 // 128, "needle_multiquery": 4}[name]


def test_numbers_of_one_word_are_listed_in_the_order_of_the_text(haystack):
    for text, answers in texts(draw("needle_multivalue", haystack)):
        assert [f" {number}" for number in re.findall(r"is (\d{7})\.\n", text)] == answers


def test_variables_follow_the_chain_and_not_the_other(haystack):
    for text, answers in texts(draw("text_variables", haystack)):
        source = dict(re.findall(r"Let (\w+) be equal to (\w+)\.\n", text))
        (value,) = re.findall(r"The names that are equal to (\d{7}), in order", text)
        for answer in answers:
            name = answer.strip()
            while name in source:
                name = source[name]
            assert name == value
        assert len(source) == 8 and len(set(source.values()) & {value}) == 1


@pytest.mark.parametrize("name", ["text_common_words", "text_frequent_words"])
def test_words_are_listed_by_their_counts(name, haystack):
    for text, answers in texts(draw(name, haystack)):
        listed = [word for line in re.findall(r"Words: ([\w, ]+)\.\n", text) for word in line.split(", ")]
        counts = {word: listed.count(word) for word in set(listed)}
        best = sorted(counts, key=counts.get, reverse=True)[:4]
        assert [f" {word}" for word in best] == answers
        assert len({counts[word] for word in best}) == 4


def test_a_quote_continues_a_line_of_its_text(haystack):
    for text, (answer,) in texts(draw("text_quote", haystack)):
        body, _, quote = text.rpartition('word for word: "')
        assert quote.endswith(answer) and quote in body and len(answer) == 8


def test_a_needle_may_lie_anywhere_and_its_depth_is_its_group(haystack):
    batch, answers = draw("needle", haystack, n_rows=60)
    for i, (text, (answer,)) in enumerate(texts((batch, answers))):
        place = text.index(f"is{answer}.") / text.rindex("\nThe secret")
        assert abs(place - (answers.groups[i] + 0.5) / N_DEPTHS) < 0.5 / N_DEPTHS + 0.05
    assert set(answers.groups) == set(range(N_DEPTHS))


def test_a_text_shorter_than_the_row_is_repeated(haystack):
    short = make_haystack(make_stream([TOKENIZER.encode("One line.\nAnother one.\n").astype(np.uint16)]), TOKENIZER)
    ((text, _),) = texts(draw("needle", short, n_rows=1))
    assert text.count("Another one.\n") > 50
    with pytest.raises(ConfigError, match="a row of 64 tokens leaves 0 for the text around what it hides"):
        draw("needle", haystack, seq_len=64)
    with pytest.raises(ConfigError, match=r"text_common_words: a row of 200 tokens has counts"):
        draw("text_common_words", haystack, seq_len=200)


def test_stacked_rows_number_their_answers_anew(haystack):
    parts = [draw("needle_multiquery", haystack, n_rows=1, seed=seed) for seed in range(2)]
    batch, answers = stack_text_rows(parts, 4)
    assert batch.input_ids.shape[0] == 4 and (batch.segment_ids[2:] == 0).all()
    assert [sorted(set(numbers[numbers >= 0])) for numbers in answers.of_target] == [[0, 1, 2, 3], [4, 5, 6, 7], [], []]
    np.testing.assert_array_equal(answers.groups, np.concatenate([part.answers.groups for part in parts]))


def test_eval_data_gives_the_same_rows_whatever_the_batch():
    config = DataConfig(recall_fraction=0.0)
    config.text.max_tokens = 60_000
    data = make_eval_data(config, 0, 300)
    whole = list(data.text_task_batches("needle", 3, 400, 3))
    single = list(data.text_task_batches("needle", 3, 400, 1))
    np.testing.assert_array_equal(whole[0].batch.input_ids, np.concatenate([rows.batch.input_ids for rows in single]))
    assert not np.array_equal(
        next(data.text_task_batches("needle", 1, 401, 1)).batch.input_ids[0, :300], single[0].batch.input_ids[0, :300]
    )
    settings = EvalConfig(recall_sequences=0, text_sequences=0, text_tasks=("needle",), text_task_lens=(50,))
    with pytest.raises(ConfigError, match="text_task_lens"):
        data.check(settings)
    with pytest.raises(ConfigError, match="needs text"):
        make_eval_data(DataConfig(recall_fraction=1.0), 0, 700).text_task_batches("needle", 1, 400, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_tasks": ("needles",)}, "eval.text_tasks is 'needles'"),
        ({"text_tasks": ("needle", "needle")}, "expected each task once"),
        ({"text_tasks": ("needle",), "text_task_lens": ()}, "eval.text_task_lens is empty"),
        ({"text_tasks": ("needle",), "text_task_lens": (99999,)}, "eval.text_task_lens is 99999"),
    ],
)
def test_settings_that_cannot_be_evaluated_are_refused(change, message):
    config = Config()
    for name, value in change.items():
        setattr(config.eval, name, value)
    with pytest.raises(ConfigError, match=re.escape(message)):
        config.validate()
