"""How long a stage is: in steps, in tokens, and extended by the gate."""

import pytest

from dsa_jax.config import Config, ConfigError, StageConfig
from dsa_jax.config.limits import INT32
from tests.dsa_jax.train.tiny import tiny_config


@pytest.mark.parametrize(
    ("stage", "n_steps"),
    [
        (StageConfig(steps=7, batch_size=4, seq_len=16), 7),
        (StageConfig(tokens=2**31, batch_size=16, seq_len=2**17), 1024),
        (StageConfig(tokens=64, batch_size=4, seq_len=16), 1),
        (StageConfig(tokens=65, batch_size=4, seq_len=16), 2),
        (StageConfig(tokens=1, batch_size=4, seq_len=16), 1),
        (StageConfig(tokens=128, batch_size=4, seq_len=16, accumulation=4), 2),
        # 3 steps of 4 x 4, then 2 of 4 x 8, then of 4 x 16
        (StageConfig(tokens=48, batch_size=4, seq_len=16, curriculum=((3, 4), (5, 8))), 3),
        (StageConfig(tokens=49, batch_size=4, seq_len=16, curriculum=((3, 4), (5, 8))), 4),
        (StageConfig(tokens=48 + 64 + 1, batch_size=4, seq_len=16, curriculum=((3, 4), (5, 8))), 6),
        (StageConfig(), 0),
    ],
)
def test_the_steps_of_a_stage(stage, n_steps):
    stage.validate("train.sparse")
    assert stage.n_steps == n_steps
    if stage.tokens:
        assert stage.tokens_after(n_steps - 1) < stage.tokens <= stage.tokens_after(n_steps)


def test_tokens_so_far_are_those_of_every_step():
    stage = StageConfig(steps=9, batch_size=3, seq_len=16, curriculum=((2, 4), (7, 8)))
    for step in range(10):
        assert stage.tokens_after(step) == 3 * sum(stage.seq_len_at(each) for each in range(step))


@pytest.mark.parametrize(
    ("steps", "tokens", "message"),
    [
        (5, 1000, r"^train\.warmup\.steps is 5 and train\.warmup\.tokens is 1000; .* train\.warmup\.steps=0 trains by tokens"),
        (0, 2**60, rf"^train\.warmup\.tokens is {2**60}, which takes \d+ steps; expected at most {INT32}\. Lower it"),
        (0, -1, r"^train\.warmup\.tokens is -1; expected zero or more, up to 2\*\*60"),
    ],
)
def test_a_length_that_cannot_be_meant_is_refused(steps, tokens, message):
    config = tiny_config()
    config.train.warmup.steps, config.train.warmup.tokens = steps, tokens
    with pytest.raises(ConfigError, match=message):
        config.validate()


def test_a_warmup_by_tokens_needs_an_indexer_too():
    config = Config()
    config.train.warmup.tokens = 100
    with pytest.raises(ConfigError, match=r"train\.warmup\.tokens is positive, but the model has no indexer"):
        config.validate()


def gated(gate="extend", steps=10, extend=4, most=10):
    train = tiny_config(steps=steps).train
    train.gate, train.gate_extend_steps, train.gate_extend_max = gate, extend, most
    return train


def test_a_gate_extends_the_warmup_up_to_a_maximum():
    train, taken, ends = gated(), 10, []
    while more := train.gate_extension(taken):
        taken += more
        ends.append(taken)
    assert ends == [14, 18, 20]
    # A process that continues at any step goes to the same end.
    want = [*[10] * 11, *[14] * 4, *[18] * 4, *[20] * 2]
    assert [train.steps_to_gate("warmup", step) for step in range(21)] == want


def test_other_gates_and_stages_extend_nothing():
    assert gated("warn").gate_extension(10) == gated("off").gate_extension(10) == 0
    assert gated("warn").steps_to_gate("warmup", 13) == 13  # begun under extend, it ends where it is
    assert gated(most=2).steps_to_gate("warmup", 13) == 13 and gated(most=2).gate_extension(13) == 0
    assert gated().steps_to_gate("sparse", 3) == gated().steps_to_gate("sparse", 10) == 10


def test_an_extension_without_a_learning_rate_is_refused():
    config = tiny_config()
    config.train.gate, config.train.warmup.optimizer.final_fraction = "extend", 0.0
    with pytest.raises(ConfigError, match=r"final_fraction is 0 with train\.gate 'extend'"):
        config.validate()
    config.train.warmup.optimizer.schedule = "constant"
    config.validate()
    config.train.warmup.optimizer.schedule, config.train.warmup.steps = "linear", 0
    config.validate()
