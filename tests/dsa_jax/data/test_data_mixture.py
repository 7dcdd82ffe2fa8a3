"""Mixture: batches are a function of (seed, step), epochs lose nothing, evaluation is fixed and apart from training."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dsa_jax.config import ConfigError, DataConfig, EvalConfig, TextConfig
from dsa_jax.data import make_data, make_eval_data, make_train_data

# Of steps 0, 1 and 2 of pure recall, seed 0, 16 rows of 256: changes only if the task, its random stream or numpy's do.
RECALL_FINGERPRINT = "e711514926643b8a90a6eded9185d26d2702059fed1fdcab1c720491af436c3c"


@pytest.fixture(scope="module")
def corpus_file(tmp_path_factory):
    """50 documents of 40 tokens with their end: 2000 tokens whose content names their place."""
    file = tmp_path_factory.mktemp("corpus") / "numbers.jsonl"
    texts = ("".join(f"{i:02d}{chr(97 + j)}" for j in range(13)) for i in range(50))
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


@pytest.fixture(scope="module")
def config(corpus_file):
    return DataConfig(recall_fraction=0.5, text=TextConfig(path=str(corpus_file), held_out_fraction=0.25))


def with_fraction(config, fraction, **text):
    path = {"path": config.text.path, "held_out_fraction": 0.25, **text}
    return DataConfig(recall_fraction=fraction, text=TextConfig(**path))


def fingerprint(batches):
    digest = hashlib.sha256()
    for batch in batches:
        for array in batch:
            digest.update(array.tobytes())
    return digest.hexdigest()


def test_rows_are_recall_first_then_text(config):
    data = make_train_data(config, 0, 617)
    assert data.vocab_size == 617
    batch = data.batch(0, batch_size=6, seq_len=32)
    assert [array.shape for array in batch] == [(6, 32)] * 4
    assert [array.dtype.name for array in batch] == ["int32", "int32", "bool", "int32"]
    assert np.all(batch.input_ids[:3] >= 257) and np.all(batch.input_ids[3:] <= 256)
    assert batch.target_mask[:3].sum() == 3 * 8
    assert not batch.targets[~batch.target_mask].any()


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_one_kind_of_rows_only(config, fraction):
    only = with_fraction(config, fraction, **({"path": "/nowhere"} if fraction == 1.0 else {}))  # text that must not be read
    data, evaluation = make_train_data(only, 0, 617), make_eval_data(only, 0, 617)
    ids = data.batch(3, batch_size=5, seq_len=32).input_ids
    assert np.all(ids >= 257) if fraction else np.all(ids <= 256)
    assert (evaluation.has_recall, evaluation.has_text) == (fraction == 1.0, fraction == 0.0)
    assert data.vocab_size == (617 if fraction else 257)
    assert (data.describe()["text"] is None, data.describe()["recall"] is None) == (fraction == 1.0, fraction == 0.0)
    with pytest.raises(ValueError, match="has no text" if fraction else "has no recall"):
        (evaluation.text_batches if fraction else evaluation.recall_batches)(4, 32, 4)


def test_batches_depend_on_seed_and_step_only(config):
    sizes = {"batch_size": 6, "seq_len": 32}
    one, two = make_train_data(config, 3, 640), make_train_data(config, 3, 640)
    forwards = [one.batch(step, **sizes) for step in range(40)]
    backwards = [two.batch(step, **sizes) for step in reversed(range(40))][::-1]
    assert fingerprint(forwards) == fingerprint(backwards)
    assert len({fingerprint([batch]) for batch in forwards}) == 40
    assert fingerprint(forwards) != fingerprint([make_train_data(config, 4, 640).batch(s, **sizes) for s in range(40)])


def test_batches_are_the_same_bits_in_another_process(config):
    program = (
        "import sys; from dsa_jax.config import DataConfig, TextConfig; from dsa_jax.data import make_train_data\n"
        "text = TextConfig(path=sys.argv[1], held_out_fraction=0.25)\n"
        "batch = make_train_data(DataConfig(text=text), 3, 640).batch(17, batch_size=6, seq_len=32)\n"
        "import hashlib; print(hashlib.sha256(b''.join(a.tobytes() for a in batch)).hexdigest())"
    )
    run = subprocess.run([sys.executable, "-c", program, config.text.path], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == fingerprint([make_train_data(config, 3, 640).batch(17, batch_size=6, seq_len=32)])


def test_recall_rows_are_the_same_bits_everywhere(config):
    data = make_train_data(with_fraction(config, 1.0), 0, 640)
    assert fingerprint(data.batch(step, batch_size=16, seq_len=256) for step in range(3)) == RECALL_FINGERPRINT


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_an_epoch_holds_every_row_once(config, batch_size):
    data = make_train_data(with_fraction(config, 0.0), 0, 640)
    n_rows = data.text.train.n_rows(16)
    steps = -(-3 * n_rows // batch_size)
    rows = np.concatenate([data.batch(step, batch_size=batch_size, seq_len=16).input_ids for step in range(steps)])
    epochs = [rows[i * n_rows : (i + 1) * n_rows] for i in range(3)]
    stream = np.pad(data.text.train.tokens, (0, -data.text.train.tokens.size % 16)).reshape(-1, 16)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == sorted(stream.tolist())
    assert not np.array_equal(epochs[0], epochs[1])


def test_a_batch_may_be_longer_than_an_epoch(config):
    data = make_train_data(with_fraction(config, 0.0), 0, 640)
    n_rows = data.text.train.n_rows(64)
    batch = data.batch(0, batch_size=2 * n_rows + 1, seq_len=64)
    assert np.unique(batch.input_ids, axis=0).shape[0] == n_rows


def test_evaluation_is_fixed_and_padded(config):
    data = make_eval_data(config, 0, 640)
    recall = list(data.recall_batches(10, 32, 4))
    assert [batch.input_ids.shape for batch in recall] == [(4, 32)] * 3
    assert not recall[2].segment_ids[2:].any() and recall[2].segment_ids[:2].all()
    assert fingerprint(recall) == fingerprint(make_eval_data(config, 0, 640).recall_batches(10, 32, 4))
    longer = np.concatenate([batch.input_ids for batch in data.recall_batches(12, 32, 6)])
    np.testing.assert_array_equal(np.concatenate([batch.input_ids for batch in recall])[:10], longer[:10])
    assert np.unique(longer, axis=0).shape[0] == 12

    text = list(data.text_batches(5, 16, 4))
    assert [batch.input_ids.shape for batch in text] == [(4, 16)] * 2
    assert not text[1].segment_ids[1:].any() and text[1].segment_ids[0].all()
    assert fingerprint(text) == fingerprint(make_eval_data(config, 9, 640).text_batches(5, 16, 4))
    assert list(data.recall_batches(0, 32, 4)) == list(data.text_batches(0, 16, 4)) == []


def test_held_out_text_is_not_repeated_to_reach_the_number_asked_for(config):
    data = make_eval_data(config, 0, 640)
    stream = data.text.held_out
    batches = list(data.text_batches(10_000, 16, 8))
    assert len(batches) == -(-stream.n_rows(16) // 8)
    real = sum(int((batch.segment_ids > 0).sum()) for batch in batches)
    assert real == stream.tokens.size
    assert sum(int(batch.target_mask.sum()) for batch in batches) == stream.tokens.size - stream.starts.size


def test_evaluation_shares_nothing_with_training(config):
    train, held_out = make_train_data(config, 0, 640), make_eval_data(config, 0, 640)
    assert train.describe() == held_out.describe()
    seen = {row.tobytes() for step in range(50) for row in train.batch(step, batch_size=8, seq_len=32).input_ids}
    fresh = [row for batch in held_out.recall_batches(50, 32, 8) for row in batch.input_ids if row.any()]
    assert len(fresh) == 50
    assert not any(row.tobytes() in seen for row in fresh)
    split = held_out.text
    in_train = {document.tobytes() for document in np.split(split.train.tokens, split.train.starts[1:])}
    assert not any(d.tobytes() in in_train for d in np.split(split.held_out.tokens, split.held_out.starts[1:]))


@pytest.mark.parametrize(("vocab_size", "fraction", "needed"), [(616, 0.5, 617), (100, 0.0, 257)])
def test_a_vocabulary_too_small_is_refused(config, vocab_size, fraction, needed):
    for make in (make_train_data, make_eval_data):
        with pytest.raises(ConfigError, match=rf"model\.vocab_size is {vocab_size}.* at least {needed}"):
            make(with_fraction(config, fraction), 0, vocab_size)


def test_tasks_take_their_share_between_recall_and_text(config):
    mixed = with_fraction(config, 0.25)
    mixed.tasks = (("passkey", 0.25), ("common_words", 0.125))
    data = make_train_data(mixed, 0, 640)
    assert data.vocab_size == 624 and data.describe()["tasks"] == {"passkey": 0.25, "common_words": 0.125}
    batch = data.batch(2, batch_size=8, seq_len=64)
    passkey, common_words = (data.setting.leading(name) for name in ("passkey", "common_words"))
    assert batch.input_ids[2:5, 0].tolist() == [passkey, passkey, common_words]
    assert np.all(batch.input_ids[:2] >= 257) and np.all(batch.input_ids[5:] <= 256)
    assert fingerprint([batch]) == fingerprint([make_train_data(mixed, 0, 640).batch(2, batch_size=8, seq_len=64)])
    recall_alone = make_train_data(with_fraction(config, 0.25), 0, 640).batch(2, batch_size=8, seq_len=64)
    np.testing.assert_array_equal(batch.input_ids[:2], recall_alone.input_ids[:2])


def test_tasks_alone_need_neither_recall_nor_text(config):
    alone = with_fraction(config, 0.0, path="/nowhere")
    alone.tasks = (("multi_needle", 0.3), ("recall", 0.25), ("mqar", 0.45))
    data, evaluation = make_train_data(alone, 0, 640), make_eval_data(alone, 0, 640)
    assert (evaluation.has_recall, evaluation.has_text) == (False, False)
    for batch_size in range(4, 40):
        assert data.batch(0, batch_size=batch_size, seq_len=64).input_ids.shape == (batch_size, 64)
    with pytest.raises(ConfigError, match=r"gives recall a share of 0\.25, which is no row of a batch of 2"):
        data.batch(0, batch_size=2, seq_len=64)


@pytest.mark.parametrize(("fraction", "kind"), [(0.03, "gives recall"), (0.97, "leave text")])
def test_a_share_that_is_no_row_is_refused(config, fraction, kind):
    with pytest.raises(ConfigError, match=rf"{kind} a share of 0\.03, which is no row of a batch of 16"):
        make_train_data(with_fraction(config, fraction), 0, 640).batch(0, batch_size=16, seq_len=64)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ((("multi_nedle", 0.1),), r"data\.tasks is 'multi_nedle'.* Did you mean 'multi_needle'"),
        ((("passkey", 0.6),), r"add up to 1\.1; expected at most 1"),
        ((("passkey", -0.1),), "share of passkey, is -0.1"),
        ((("passkey", 0.1), ("passkey", 0.1)), "expected each task once"),
        ((("passkey",),), r"expected \(task, share\)"),
    ],
    ids=["unknown", "too_much", "negative", "twice", "no_share"],
)
def test_mixtures_that_cannot_be_are_refused(config, tasks, message):
    wrong = with_fraction(config, 0.5)
    wrong.tasks = tasks
    with pytest.raises(ConfigError, match=message):
        make_train_data(wrong, 0, 640)


def test_any_task_can_be_evaluated_and_is_apart_from_training(config):
    alone = with_fraction(config, 0.0, path="/nowhere")
    alone.tasks = (("passkey", 1.0),)
    data = make_eval_data(alone, 0, 640)
    batches = list(data.task_batches("multi_needle", 5, 64, 4))
    assert [batch.input_ids.shape for batch in batches] == [(4, 64)] * 2 and not batches[1].segment_ids[1:].any()
    one_by_one = np.concatenate([batch.input_ids for batch in data.task_batches("multi_needle", 5, 64, 1)])
    np.testing.assert_array_equal(np.concatenate([batch.input_ids for batch in batches])[:5], one_by_one)
    training = make_train_data(alone, 0, 640)
    seen = {row.tobytes() for step in range(20) for row in training.batch(step, batch_size=8, seq_len=64).input_ids}
    fresh = [row for batch in data.task_batches("passkey", 50, 64, 50) for row in batch.input_ids]
    assert len({row.tobytes() for row in fresh}) == 50 and not any(row.tobytes() in seen for row in fresh)


def test_evaluation_says_early_what_it_cannot_make(config):
    data = make_eval_data(config, 0, 620)
    with pytest.raises(ConfigError, match=r"vocab_size is 620, too small for the task passkey, whose tokens end at 624"):
        data.task_batches("passkey", 4, 64, 4)
    assert len(list(data.task_batches("recall", 4, 64, 4))) == 1
    with pytest.raises(ConfigError, match="Did you mean 'passkey'"):
        data.task_batches("pass_key", 4, 64, 4)
    with pytest.raises(ConfigError, match="frequent_words: a row of 64 tokens"):
        make_eval_data(config, 0, 640).check(
            EvalConfig(text_len=16, recall_len=64, tasks=("passkey", "frequent_words"), task_len=64)
        )
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        data.check(EvalConfig(recall_sequences=0, text_sequences=0))


def test_text_shorter_than_a_row_is_refused(config):
    with pytest.raises(ConfigError, match=r"the training text has \d+ tokens, shorter than one sequence of 4000"):
        make_train_data(with_fraction(config, 0.0), 0, 640).batch(0, batch_size=2, seq_len=4000)
    with pytest.raises(ConfigError, match=r"the held-out text has \d+ tokens, shorter than one sequence of 4000"):
        make_eval_data(config, 0, 640).text_batches(4, 4000, 2)


def test_other_text_than_a_checkpoint_was_trained_on_is_refused(config, tmp_path, caplog):
    data = make_train_data(config, 0, 617)
    data.restore(data.state())
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": "other text " * 40}) + "\n")
    with pytest.raises(ConfigError, match=r"other\.jsonl is not the text that the run was trained on so far"):
        make_train_data(with_fraction(config, 0.5, path=str(other)), 0, 617).restore(data.state())
    assert not caplog.messages
    data.restore(None)  # of an earlier version, which recorded nothing
    assert "does not say what text it was trained on" in caplog.text
    assert make_train_data(with_fraction(config, 1.0), 0, 617).state() is None


def test_the_same_text_elsewhere_is_gone_on_with(config, tmp_path):
    data = make_train_data(with_fraction(config, 0.0), 0, 617)
    (tmp_path / "moved").mkdir()
    moved = tmp_path / "moved" / "another_name.jsonl"
    moved.write_bytes(Path(config.text.path).read_bytes())
    again, evaluation = make_data(with_fraction(config, 0.0, path=str(moved)), 0, 617)
    again.restore(data.state())
    sizes = {"batch_size": 4, "seq_len": 32}
    assert fingerprint([again.batch(3, **sizes)]) == fingerprint([data.batch(3, **sizes)])
    assert evaluation.text is again.text
    with moved.open("a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    with pytest.raises(ConfigError, match=r"another_name\.jsonl is not the text .* of the same content, wherever they lie"):
        make_train_data(with_fraction(config, 0.0, path=str(moved)), 0, 617).restore(data.state())


@pytest.mark.parametrize("wrong", [{"step": -1}, {"batch_size": 0}, {"seq_len": 0}], ids=str)
def test_impossible_batches_are_refused(config, wrong):
    arguments = {"step": 0, "batch_size": 4, "seq_len": 32, **wrong}
    with pytest.raises(ValueError, match="expected step >= 0 and positive sizes"):
        make_train_data(with_fraction(config, 1.0), 0, 640).batch(arguments.pop("step"), **arguments)


def test_the_config_is_validated():
    with pytest.raises(ConfigError, match=r"data\.recall_fraction is 1\.5"):
        make_train_data(DataConfig(recall_fraction=1.5), 0, 640)


@pytest.mark.parametrize("side", [make_train_data, make_eval_data])
def test_advice_on_a_small_vocabulary_holds_for_a_model_that_is_given(side):
    config = DataConfig(recall_fraction=1.0)
    with pytest.raises(ConfigError, match=r"too small .*To train from scratch set model\.vocab_size=") as said:
        side(config, 0, 10)
    assert "The model of init.hf_dir or init.checkpoint keeps its vocabulary" in str(said.value)
    assert "data.recall_fraction=0" in str(said.value)
