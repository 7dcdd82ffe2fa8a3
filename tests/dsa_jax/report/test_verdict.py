"""What a report says first, from literal tables."""

import copy

import pytest

from dsa_jax.report.verdict import verdict


def difference(mean, error):
    return {"mean": mean, "standard_error": error}


def row(name, loss, found, *, keys=30.0, error=0.001, of_tasks=0.01):
    entry = {"accuracy": found, "difference": difference(found - 0.9, of_tasks)}
    return {
        "name": name,
        "text_loss": loss,
        "text_loss_difference": difference(loss - 3.5, error),
        "keys_per_query": keys,
        "tasks": {"needle": {"accuracy": found, "by_length": {"512": entry}}},
    }


COSTS = {"lengths": [256, 512], "dense_flops": [2e9, 3e9], "sparse_flops": [2.2e9, 2.7e9], "pays_from": 512}


def report(sparse_loss=3.51, found=0.89, **options):
    return {
        "rows": [row("dense", 3.5, 0.9, keys=128.0), row("sparse", sparse_loss, found, **options)],
        "costs": COSTS,
        "coverage_by_layer": {"sparse": [0.95, 0.9]},
    }


def test_what_is_kept_and_saved():
    quality, savings, doubts = verdict(report())
    assert quality == (
        "Sparse attention keeps what dense attention has, on the same weights: text loss 3.510 instead of 3.500 nats per token "
        "(+0.010 ± 0.001); needle at 512 tokens 89.0% instead of 90.0% (± 1.0%)."
    )
    assert savings == (
        "It reads 30.0 keys per query instead of 128.0, computes 2.20 GFLOP per token instead of 2.00 in a sequence of 256 "
        "(+10%, by formula) and computes less from 512 tokens on."
    )
    assert doubts == ()


def test_a_loss_of_one_measure_is_named_though_text_hides_it():
    assert verdict(report(found=0.6)).quality.startswith("Sparse attention loses on needle at 512 tokens, on the same weights")
    assert verdict(report(3.53, 0.6)).quality.startswith("Sparse attention loses on text and needle at 512 tokens")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["rows"][1].update(keys_per_query=128.0), "every key that dense read"),
        (
            lambda r: r["coverage_by_layer"].update(sparse=[0.5, 0.9]),
            "1 of 2 layers hold less than 80% of the attention (layer 0",
        ),
        (
            lambda r: r["rows"].append(row("sparse, untrained indexer", 3.505, 0.9)),
            "sparse, untrained indexer keeps it as well",
        ),
        (
            lambda r: r["rows"].append(row("window of the same budget", 3.505, 0.9)),
            "window of the same budget keeps it as well",
        ),
        (lambda r: r["rows"][0]["tasks"]["needle"]["by_length"]["512"].update(accuracy=0.4), "itself answers less than half"),
    ],
)
def test_doubts_are_said(change, message):
    changed = copy.deepcopy(report())
    change(changed)
    (doubt,) = verdict(changed).doubts
    assert message in doubt


def test_errors_too_wide_to_decide_are_said():
    (doubt,) = verdict(report(3.53, 0.9, error=0.05)).doubts
    assert "less than two standard errors" in doubt and "text" in doubt
    (doubt,) = verdict(report(3.51, 0.9, error=0.05)).doubts
    assert "too wide to rule out a loss" in doubt
    assert verdict({"rows": [row("sparse", 3.5, 0.9)]}).quality.startswith("The rows dense and sparse were not both evaluated")
