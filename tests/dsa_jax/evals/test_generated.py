"""Answers found in generated text, on a model that is rigged to write certain words."""

import functools
import itertools
import re

import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.config import Config, ConfigError, DataConfig
from dsa_jax.data import Batch, ByteTokenizer, make_eval_data
from dsa_jax.data.text_tasks import Answers, TextRows, get_text_task, make_haystack
from dsa_jax.evals.generated import SLACK, answers_found, contains, continuing, why_not_generated
from dsa_jax.evals.parity import remarks_on
from dsa_jax.evals.task import evaluate_task, make_eval_step
from dsa_jax.params import nested_parameters, parameter_paths
from tests.dsa_jax.model.small import built, small_config

TOKENIZER = ByteTokenizer()
WRITTEN = "abcdefghijklmnopqrstuvwxyz."
"""What the model writes: each of these characters after the one before it, and nothing else."""


@functools.cache
def rigged():
    """A model whose next token is a function of the last one, and its parameters."""
    model, params = built("gqa", vocab_size=260, tie_embeddings=False, max_positions=256, implementation="xla")
    rng = np.random.default_rng(1)
    embedding = rng.standard_normal((260, 32))
    embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
    head = np.zeros((32, 260))
    for before, after in itertools.pairwise(WRITTEN):
        head[:, ord(after)] = embedding[ord(before)]
    leaves = parameter_paths(params)
    silent = {path: jnp.zeros_like(leaf) for path, leaf in leaves.items() if path.endswith(("wo/kernel", "down/kernel"))}
    leaves |= silent | {"embed/embedding": jnp.asarray(embedding), "lm_head/kernel": jnp.asarray(head)}
    leaves["final_norm/scale"] = jnp.ones(32)
    return model, nested_parameters({path: leaf.astype(jnp.float32) for path, leaf in leaves.items()})


def rows_of(*texts):
    """A row for each text, with answers in brackets, those of a list in one pair: `so a[bc,de], then e[fg]`."""
    length = max(len(re.sub(r"[][]", "", text)) for text in texts) - 1
    inputs, of_target = np.zeros((2, len(texts), length), np.int32), np.full((len(texts), length), -1)
    opens = []
    for row, text in enumerate(texts):
        tokens, numbers, inside = [], [], False
        for character in text:
            if character in "[]":
                inside = character == "["
                opens += [True] if inside else []
                continue
            if inside and character == ",":
                opens.append(False)
            tokens.append(ord(character))
            numbers.append(len(opens) - 1 if inside and character != "," else -1)
        inputs[:, row, length + 1 - len(tokens) :] = tokens[:-1], tokens[1:]
        of_target[row, length + 1 - len(tokens) :] = numbers[1:]
    mask = of_target >= 0
    batch = Batch(inputs[0], np.where(mask, inputs[1], 0), mask, np.ones(of_target.shape, np.int32))
    return TextRows(batch, Answers(of_target, np.zeros(len(opens), np.int64), np.asarray(opens)))


CASES = [  # text, whether argmax hits each answer, whether generated text contains it
    ("tell: a[bcd]", [True], [True]),
    ("tell: a[bxd]", [False], [False]),
    ("tell: a[def]", [False], [True]),  # after other words
    ("tell: a[BCD]", [False], [True]),  # in other letters
    ("tell: a[xyz]", [False], [False]),  # beyond what is read
    ("tell: a[def,bc]", [False, False], [True, True]),  # in another order
    ("tell: a[bcd,xy,fg]", [True, False, False], [True, False, True]),
    ("tell: a[bc], and then: k[lm]", [True, True], [True, True]),
    ("tell: a[yz], and then: k[lm]", [False, True], [False, True]),
]


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_what_argmax_and_generation_count(attention):
    """`bcd` is written after an a: an answer in one piece that is reproduced counts for both, others for generation alone."""
    model, params = rigged()
    rows = rows_of(*(text for text, _, _ in CASES))
    result = evaluate_task(make_eval_step(model, attention), params, [rows], 1)
    found = answers_found(continuing(model, params, TOKENIZER, attention, 16), TOKENIZER, [rows])
    scored = result.scored_by(found)
    assert result.hits == [hit for _, hits, _ in CASES for hit in hits]
    assert scored.hits == [hit for _, _, hits in CASES for hit in hits]
    assert scored.accuracy == scored.accuracy_by_group[0] == np.mean(scored.hits) > result.accuracy
    assert scored.loss == result.loss


def test_the_answers_of_all_batches_are_found_in_order():
    """Rows of unequal questions, one of them without any."""
    seen = []

    def continued(prompts, n_new):
        seen.append(([TOKENIZER.decode(prompt) for prompt in prompts], n_new))
        return [TOKENIZER.encode("bcd").tolist() for _ in prompts]

    batches = [rows_of("so: a[bcd]", "so: b[cd,e]"), rows_of("so: c[d]x[y]", "no: q")]
    assert answers_found(continued, TOKENIZER, batches).tolist() == [True, True, False, True, False]
    ((prompts, n_new),) = seen
    assert [prompt.strip("\0") for prompt in prompts] == ["so: a", "so: b", "so: c", "so: c" + "dx"] and n_new == 4 + SLACK
    assert answers_found(lambda prompts, _: [], TOKENIZER, [rows_of("none")]).tolist() == []


@pytest.mark.parametrize(
    ("written", "expected", "found"),
    [
        ("the number 1234567.", " 1234567", True),
        ("the number 1234568.", " 1234567", False),
        ("", " 1", False),
        (" \n", "\n", False),
        ("\n ", "\n", True),  # nothing but space: as it was
        ("", "", True),
        ("Ä", "ä", True),
    ],
)
def test_an_answer_counts_as_rulers_match_has_it(written, expected, found):
    assert contains(TOKENIZER, TOKENIZER.encode(written).tolist(), TOKENIZER.encode(expected).tolist()) is found
    cut = TOKENIZER.encode("ä").tolist()
    assert contains(TOKENIZER, cut, cut[:1])  # the tokens are there, though they spell another character


@pytest.mark.parametrize(
    ("name", "opening"), [("needle", 1), ("needle_multivalue", 1), ("needle_multiquery", 4), ("text_quote", 1)]
)
def test_a_question_is_asked_once(name, opening):
    config = DataConfig(recall_fraction=0.0)
    config.text.max_tokens = 60_000
    stream = make_eval_data(config, 0, 300).text.held_out
    draw = functools.partial(get_text_task(name).rows, TOKENIZER, make_haystack(stream, TOKENIZER), n_rows=2, seq_len=900)
    rows = draw(np.random.default_rng(0))
    assert rows.answers.opens.sum() == 2 * opening and rows.answers.opens[0]
    prompts = []
    answers_found(lambda asked, _: prompts.extend(asked) or [[]] * len(asked), TOKENIZER, [rows])
    assert [len(prompts), prompts[0]] == [2 * opening, rows.batch.input_ids[0, : len(prompts[0])].tolist()]


def test_rows_that_cannot_generate_are_said():
    config = Config(data=DataConfig(recall_fraction=0.0))
    config.data.text.max_tokens = 60_000
    data = make_eval_data(config.data, 0, 300)
    config.model.attention.kind, config.eval.rows = "nsa", ("dense", "nsa")
    config.eval.text_tasks, config.eval.text_task_scoring = ("needle",), "both"
    assert "cannot run over a cache" in why_not_generated(config.model, "nsa") and not why_not_generated(config.model, "dense")
    (remark,) = [each for each in remarks_on(config, data) if "generation" in each]
    assert remark.startswith("The row native sparse attention shows no score by generation") and "over a cache" in remark
    config.eval.text_task_scoring = "argmax"
    assert not [each for each in remarks_on(config, data) if "generation" in each]
    assert not [name for name in ("oracle", "random", "blocks") if why_not_generated(small_config("mla"), name)]


def test_rows_with_no_room_to_generate_are_refused():
    config = Config()
    config.eval.text_tasks, config.eval.text_task_lens = ("needle",), (config.model.max_positions,)
    config.validate()
    config.eval.text_task_scoring = "generation"
    with pytest.raises(ConfigError, match=r"eval\.text_task_lens with the 64 that text_task_scoring=generation may write"):
        config.validate()
    config.eval.text_task_scoring = "generate"
    with pytest.raises(ConfigError, match=r"eval.text_task_scoring is 'generate'.*argmax"):
        config.validate()
