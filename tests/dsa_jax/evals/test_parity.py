import copy
import dataclasses

import jax
import numpy as np
import pytest

from dsa_jax.config import TASKS, TaskConfig
from dsa_jax.data import Batch, make_eval_data
from dsa_jax.data.tasks import get_task
from dsa_jax.evals.parity import evaluate_parity, remarks_on, with_fresh_indexer
from dsa_jax.evals.task import Groups, evaluate_task, make_eval_step
from dsa_jax.model import build_model, init_params
from dsa_jax.params import is_indexer_path, parameter_paths
from tests.dsa_jax.model.small import forward
from tests.dsa_jax.train.tiny import tiny_config


@pytest.fixture(scope="module")
def setting():
    config = tiny_config()
    model = build_model(config.model)
    return config, model, init_params(model, jax.random.key(0))


def test_task_means_match_the_whole_logits(setting):
    """Loss and accuracy against log_softmax of the full logits, on batches of which one is half padding."""
    config, model, params = setting
    data = make_eval_data(config.data, 0, config.model.vocab_size)
    batches = list(data.recall_batches(6, 16, 4))
    result = evaluate_task(make_eval_step(model, "dense"), params, batches, 4)
    nll, hits = [], []
    for batch in batches:
        logits = forward(model, params, batch.input_ids, batch.segment_ids, attention="dense").logits
        chosen = np.asarray(jax.nn.log_softmax(logits))[batch.target_mask]
        target = batch.targets[batch.target_mask]
        nll.append(-chosen[np.arange(len(target)), target])
        hits.append(chosen.argmax(-1) == target)
    assert result.n_targets == 6 * 4 and result.n_queries == 6 * 16
    np.testing.assert_allclose(result.loss, np.concatenate(nll).mean(), rtol=1e-5)
    np.testing.assert_allclose(result.accuracy, np.concatenate(hits).mean())
    # Targets are in the last quarter only, which is the last of four buckets.
    assert np.isnan(result.loss_by_position[:3]).all()
    np.testing.assert_allclose(result.loss_by_position[3], result.loss, rtol=1e-6)


def test_accuracy_by_group_counts_each_target_once(setting):
    """Groups by the target itself; the last batch is part padding, the last group is empty."""
    config, model, params = setting
    data = make_eval_data(config.data, 0, config.model.vocab_size)
    first_value = data.setting.symbols.first_value
    groups = Groups(lambda batch: np.where(batch.target_mask, batch.targets - first_value, -1), 3)
    batches = list(data.recall_batches(6, 16, 4))
    result = evaluate_task(make_eval_step(model, "dense"), params, batches, 4, groups)
    hits, targets = np.zeros(3), np.zeros(3)
    for batch in batches:
        logits = forward(model, params, batch.input_ids, batch.segment_ids, attention="dense").logits
        for row, t in zip(*np.nonzero(batch.target_mask), strict=True):
            group = batch.targets[row, t] - first_value
            targets[group] += 1
            hits[group] += np.argmax(logits[row, t]) == batch.targets[row, t]
    np.testing.assert_allclose(result.accuracy_by_group[:2], hits[:2] / targets[:2])
    assert np.isnan(result.accuracy_by_group[2]) and targets[:2].sum() == result.n_targets
    np.testing.assert_allclose(result.accuracy, hits.sum() / targets.sum())


def test_every_task_gets_a_column(setting):
    config, model, params = setting
    config = copy.deepcopy(config)
    config.data.task = TaskConfig(n_needles=2, n_asked=1, n_chains=2, n_hops=1, n_answers=1)
    config.eval.tasks, config.eval.task_len, config.eval.task_sequences, config.eval.rows = TASKS, 16, 4, ("dense", "sparse")
    data = make_eval_data(config.data, 0, config.model.vocab_size)
    assert data.setting.end <= config.model.vocab_size
    for row in evaluate_parity(model, params, data, config).rows:
        assert tuple(row["tasks"]) == TASKS and row["recall_accuracy"] is not None
        sizes = {name: len(result[f"by_{get_task(name).grouping}"]) for name, result in row["tasks"].items()}
        assert sizes == {n: get_task(n).n_groups(data.setting) for n in TASKS}
        for result in row["tasks"].values():
            assert 0.0 <= result["accuracy"] <= 1.0 and result["loss"] > 0.0
            assert result["keys_per_query"] == pytest.approx(8.5 if row["name"] == "dense" else (4 * 16 - 6) / 16)


def test_rows_that_select_blocks_say_what_they_keep_of_the_indexers_keys(setting):
    config, model, params = setting
    config = copy.deepcopy(config)
    config.eval.rows = ("sparse", "blocks", "coarse_to_fine")
    data = make_eval_data(config.data, 0, config.model.vocab_size)
    sparse, blocks, coarse_to_fine = evaluate_parity(model, params, data, config).rows
    assert "indexer_recall" not in sparse and 0 < blocks["indexer_recall"] <= 1
    # Blocks of 128 keys cover rows of 16.
    assert coarse_to_fine["indexer_recall"] == pytest.approx(1.0)


def test_padding_rows_count_in_nothing(setting):
    config, model, params = setting
    data = make_eval_data(config.data, 0, config.model.vocab_size)
    (batch,) = data.recall_batches(2, 16, 2)
    padded = Batch(*(np.concatenate([x, np.zeros_like(x)]) for x in batch))
    step = make_eval_step(model, "sparse")
    one, other = (evaluate_task(step, params, [b], 2) for b in (batch, padded))
    for name, value in dataclasses.asdict(one).items():
        if value is None:
            assert getattr(other, name) is None
            continue
        values, others = ((list(x.values()) if isinstance(x, dict) else x) for x in (value, getattr(other, name)))
        np.testing.assert_allclose(others, values, rtol=1e-5, err_msg=name)
    assert np.isfinite(one.health["entropy"]).all() and np.isfinite(one.health["overlap"][1:]).all()
    for row, means in zip(one.row_losses, one.row_losses_by_position, strict=True):
        assert np.nanmin(means) * (1 - 1e-5) <= row <= np.nanmax(means) * (1 + 1e-5)  # nan: no target in that bucket


def test_fresh_indexer_replaces_the_indexer_only(setting):
    _, model, params = setting
    mixed = parameter_paths(with_fresh_indexer(params, init_params(model, jax.random.key(1))))
    before = parameter_paths(params)
    assert mixed.keys() == before.keys()
    for path in before:
        if path.endswith("kernel") and is_indexer_path(path):
            assert not np.array_equal(mixed[path], before[path]), path
        elif not is_indexer_path(path):
            np.testing.assert_array_equal(mixed[path], before[path], err_msg=path)


def test_a_budget_of_the_whole_context_makes_every_row_dense(setting):
    config, _, params = setting
    config = dataclasses.replace(config, model=dataclasses.replace(config.model))
    config.model.attention = dataclasses.replace(config.model.attention)
    config.model.attention.indexer = dataclasses.replace(config.model.attention.indexer, topk=16)
    data = make_eval_data(config.data, 0, config.model.vocab_size)
    rows = evaluate_parity(build_model(config.model), params, data, config).rows
    for row in rows:
        assert row["recall_accuracy"] == rows[0]["recall_accuracy"]
        np.testing.assert_allclose([row["coverage"], row["keys_per_query"]], [1.0, 8.5], rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"recall_len": 16}, None),
        ({"recall_len": 4}, "eval.recall_len (4)"),
        ({"tasks": ("mqar",), "task_len": 3}, "eval.task_len (3)"),
        ({"recall_len": 2, "tasks": ("mqar",), "task_len": 4}, "eval.recall_len (2) and eval.task_len (4)"),
        ({"recall_len": 4, "rows": ("dense",)}, None),
        ({"text_len": 2}, None),  # no text is evaluated
    ],
)
def test_a_budget_that_covers_a_length_is_said(changes, named):
    config = tiny_config()
    for name, value in changes.items():
        setattr(config.eval, name, value)
    remarks = remarks_on(config, make_eval_data(config.data, 0, config.model.vocab_size))
    assert [named in remark for remark in remarks] == ([] if named is None else [True])
    assert all("topk is 4, no less than" in remark for remark in remarks)
