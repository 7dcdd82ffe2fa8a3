"""What a report says first, from literal tables."""

import copy

import pytest

from dsa_jax.report.page import render_page
from dsa_jax.report.report import format_about, format_samples, format_verdict
from dsa_jax.report.verdict import about, verdict


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
COSTS |= {"dense_cache_bytes": 1024, "sparse_cache_bytes": 1280}


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


SETUP = {
    "checkpoint": "runs/mine, stage sparse",
    "text": {"source": "notes.txt", "tokenizer": "bytes"},
    "topk": [64],
    "indexer": {"n_heads": 4, "head_dim": 32},
    "sizes": {"recall": [8, 256], "text": [16, 128], "needle@512": [24, 512], "needle@2048": [24, 2048]},
}


def test_what_was_compared_is_said_first_in_the_same_words_everywhere():
    sentence = (
        "Evaluated: runs/mine, stage sparse, text notes.txt (tokenizer bytes), topk 64, indexer of 4 heads x 32; recall 8 rows "
        "of 256 tokens, text 16 rows of 128 tokens, needle 24 rows of 512 and 2048 tokens."
    )
    whole = report() | {"setup": SETUP, "name": "mine"}
    assert about(whole) == sentence and format_verdict(whole).splitlines()[0] == sentence
    assert render_page(whole, []).index(sentence) < render_page(whole, []).index("Sparse attention keeps")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"topk": [8, 64, 512]}, "topk 8, 64 and 512, indexer"),
        ({"topk": None, "indexer": None}, "(tokenizer bytes), no indexer; recall"),
        ({"text": None}, "stage sparse, topk 64"),
    ],
)
def test_what_an_evaluation_lacks_is_not_named(change, part):
    assert part in about({"setup": SETUP | change})
    assert about({}) == "" and format_about({}) == []


def test_samples_are_text_and_never_markup_or_control():
    sample = {"prompt": "<b>now</b>", "text": "it is", "continuations": {"dense": "<script>", "sparse": "a\x1b[31mb\nc"}}
    whole = report() | {"samples": [sample], "name": "mine"}
    page = render_page(whole, [])
    assert "&lt;b&gt;now&lt;/b&gt;" in page and "&lt;script&gt;" in page and "<script>" not in page
    assert format_samples(whole).splitlines()[-1] == r"sparse: a\x1b[31mb\nc"
    assert format_samples(report()) == "" and "How does it write" not in render_page(report() | {"name": "mine"}, [])


def test_a_measure_that_a_row_lacks_counts_in_nothing():
    whole = report()
    for each in whole["rows"]:
        each["tasks"]["needle, generated"] = {"accuracy": None, "by_length": {"512": {"accuracy": None}}}
    assert verdict(whole) == verdict(report()) and "generated" in render_page(whole | {"name": "mine"}, [])
