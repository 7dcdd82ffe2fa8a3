"""What every setting refuses, made from its declaration: one line, its full name, at once, from code and from config.json."""

import dataclasses
import functools
import math
import re
import time

import numpy as np
import pytest

from dsa_jax.config import Config, ConfigError, from_dict, to_dict
from dsa_jax.config.fields import check_field, set_field
from dsa_jax.config.limits import PATH, Choices, Range, Text, limit_of


def leaves(cls, prefix=""):
    """(path, field) of every setting."""
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            yield from leaves(field.type, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field


FIELDS = dict(leaves(Config))
HUGE = 10**5000


def wrong(field):
    """Too small, too large, not finite, another kind; for a tuple also as its entry."""
    limit = limit_of(field)
    values = {
        int: [limit.least - 1, limit.most + 1, -HUGE, HUGE, 2**63, -1e300, math.nan, True, "x", None]
        if field.type is int
        else [],
        float: [-1e300, 1e300, -HUGE, HUGE, math.nan, math.inf, -math.inf, True, "x", [1.0]],
        bool: [0, 2, "true", None, math.nan],
        str: ["a" * 5000, "a\0b", "\ud800", 7, None, ["a"]],
    }
    return values.get(
        field.type, ["abc", 7, None, math.nan, (math.nan,), ("a" * 5000,), (HUGE,), ((), ()), (None,), (2,) * 20_000]
    )


def refusal(call, name):
    started = time.perf_counter()
    with pytest.raises(ConfigError) as error:
        call()
    message = str(error.value)
    assert time.perf_counter() - started < 2 and "\n" not in message and len(message) < 500, message
    assert re.search(rf"{name}\b", message) and "expected" in message, message
    return message


@pytest.mark.parametrize("path", FIELDS)
def test_every_setting_refuses_what_it_cannot_be(path):
    config, values = Config(), to_dict(Config())
    *parents, name = path.split(".")
    section = functools.reduce(lambda node, part: node[part], parents, values)
    for value in wrong(FIELDS[path]):
        set_field(config, path, value)
        refusal(config.validate, path)
    section[name] = wrong(FIELDS[path])[0]
    refusal(lambda: from_dict(Config, values, prefix=""), path)


def test_every_number_declares_its_range_and_reaches_both_ends():
    for path, field in FIELDS.items():
        limit = limit_of(field)
        if field.type in (int, float):
            assert isinstance(limit, Range), path
            for value in (limit.least, limit.most, *([0] if limit.or_zero else [])):
                check_field(path, field, field.type(value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.norm_eps", 1e300),
        ("model.initializer_range", 0.0),
        ("model.embedding_initializer_range", -1.0),
        ("model.logits_scale", 0.0),
        ("model.attention.indexer.norm_eps", -1e-6),
        ("model.attention.indexer.n_heads", 2**31),
        ("model.attention.indexer.topk", 2**31),
        ("model.attention.indexer.coarse_blocks", 2**63),
        ("model.attention.rope.theta", 1e300),
        ("model.attention.rope.factor", 1e300),
        ("model.attention.rope.beta_fast", 0.0),
        ("model.attention.rope.beta_slow", -1.0),
        ("model.attention.rope.low_freq_factor", 0.0),
        ("model.attention.rope.low_freq_factor", -1.0),
        ("model.moe.bias_update_rate", -0.1),
        ("model.moe.balance_loss_weight", -0.1),
        ("model.moe.routed_scale", 0.0),
        ("model.attention.rope.attention_factor", 1e-300),
        ("model.family", "lama"),
        ("model.n_layers", 10**9),
        ("model.eos_token_ids", (2, -1)),
        ("model.eos_token_ids", (2, 640)),
        ("model.bos_token_id", 640),
        ("train.sparse.optimizer.eps", 1e300),
        ("train.sparse.optimizer.clip_norm", 1e-300),
        ("train.warmup.steps", 2**31),
        ("train.pretrain.curriculum", ((5, 0),)),
        ("eval.rows", ()),
        ("eval.rows", ("dense", "sparse", "dense")),
        ("eval.position_buckets", 2**63),
        ("data.text.path", "d/" + "x" * 300),
        ("data.tasks", (("mqar", -0.5),)),
        ("init.hf_dir", "x" * 300),
        ("init.checkpoint", "x/" * 2050),
        ("parallel.data", 2**31),
        ("parallel.preset", "fsdp" + "9" * 400),
    ],
)
def test_what_cannot_mean_anything(path, value):
    config = Config()
    set_field(config, path, value)
    refusal(config.validate, path)


@pytest.mark.parametrize("stage", ["warmup", "sparse"])
def test_an_indexer_that_is_trained_alone_learns_by_its_loss(stage):
    config = Config()
    config.model.attention.indexer.enabled = True
    getattr(config.train, stage).indexer_loss_weight = 0.0
    config.validate()  # no such stage
    getattr(config.train, stage).steps = 5
    config.train.sparse_trains = "indexer"
    refusal(config.validate, f"train.{stage}.indexer_loss_weight")
    if stage == "sparse":
        config.train.sparse_trains = "all"
        config.validate()


def test_needles_that_are_asked_for_must_exist_where_the_task_is_used():
    config = Config()
    config.data.task.n_needles = 4
    config.validate()  # nothing asks
    config.eval.tasks = ("multi_needle",)
    assert "needles that there are" in refusal(config.validate, "data.task.n_asked")


def test_a_long_path_of_short_names_and_limits_of_text():
    PATH.check("x", "d" * 255 + "/" + "e" * 255)
    PATH.check("x", "é" * 127)
    with pytest.raises(ConfigError, match=r"x is 'é+\.\.\.é+', 256 bytes; expected a path"):
        PATH.check("x", "é" * 128)
    with pytest.raises(ConfigError, match="expected text in UTF-8"):
        Text(10).check("x", "\udcff")


def test_words_of_limits():
    assert Range(1, 2**31 - 1).words == "a positive number from 1 to 2**31 - 1"
    assert Range(0, 4096).words == "zero or more, up to 4096"
    assert Range(1e-9, 1e9, or_zero=True).words == "0 or a positive number from 1e-09 to 1e+09"
    assert Range(-1, 2**24).words == "a number from -1 to 2**24"
    assert Choices(("a", "b")).words == "one of a, b"


def test_numbers_of_numpy_and_ends_of_ranges_stay_what_they_were():
    config = Config(seed=2**32 - 2)
    config.model.attention.indexer.topk = 2**31 - 1
    config.train.sparse.optimizer.learning_rate = np.float64(1e-6)
    config.train.sparse.optimizer.clip_norm = 0.0
    config.validate()
