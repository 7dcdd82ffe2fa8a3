"""The page of a run in training: how far it is, its looks at held-out rows, and the differences to dense afterwards."""

import math

import numpy as np
import pytest

from dsa_jax.report.looks import held_out_section, position_of
from dsa_jax.report.plots import differences_by_row, heat_maps
from dsa_jax.report.report import write_progress, write_report
from dsa_jax.run.metrics import MetricsLog, read_metrics
from tests.dsa_jax.report.test_report import check, make_report

STAGES = ("pretrain", "warmup", "sparse")
CONFIG = {"train": {"pretrain": {"steps": 100}, "warmup": {"steps": 40}, "sparse": {"steps": 0}}}


def look(step, n_layers=3, **changed):
    """An entry of evaluations.jsonl; its first layer has no neighbour."""
    values = {"dense_loss": 2.0, "sparse_loss": 2.1, "difference": 0.1, "standard_error": 0.01}
    for layer in range(n_layers):
        share = (step + layer) / (40 + n_layers)
        values |= {f"{name}_layer_{layer}": share for name in ("coverage", "entropy", "local_share")}
        values |= {f"overlap_layer_{layer}": share if layer else math.nan, f"n_not_finite_layer_{layer}": 0.0}
    return values | changed


def test_a_killed_and_resumed_run_keeps_all_points_and_says_how_far_it_is(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        for step in (10, 20, 30):
            log.log("warmup", step, {"kl": 1 / step})
            log.log_evaluation("warmup", step, look(step))
        write_progress(tmp_path, {"name": "mine", "config": CONFIG})
    first = (tmp_path / "report.html").read_text()
    assert "mine: still training, step 130 of 140" in first and "Stage warmup, step 30 of 40" in first
    # Killed after step 30, resumed from the checkpoint of step 20.
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.truncate_after(STAGES, "warmup", 20)
        log.log("warmup", 30, {"kl": 1 / 30})
        log.log_evaluation("warmup", 30, look(30))
        write_progress(tmp_path, {"name": "mine", "config": CONFIG})
        assert (tmp_path / "report.html").read_text() == first
        log.log_evaluation("warmup", 40, look(40))
    assert [entry["step"] for entry in read_metrics(tmp_path / "evaluations.jsonl")] == [10, 20, 30, 40]
    write_report(tmp_path, make_report())
    page = (tmp_path / "report.html").read_text()
    check(page)
    for step in (10, 20, 30, 40):
        assert f'<tr><th scope="row">warmup</th><td>{step}</td>' in page
    assert "Selection of each layer at each look at held-out rows: coverage, entropy, local share, overlap." in page


@pytest.mark.parametrize(
    ("logged", "in_stage", "in_all"),
    [
        ([], "Stage pretrain, step 0 of 100", "step 0 of 140"),
        ([("pretrain", 7)], "Stage pretrain, step 7 of 100", "step 7 of 140"),
        ([("warmup", 3), ("warmup", 2)], "Stage warmup, step 3 of 40", "step 103 of 140"),
    ],
)
def test_the_position_is_that_of_the_last_step_logged(logged, in_stage, in_all):
    assert position_of(CONFIG, [{"stage": stage, "step": step} for stage, step in logged]) == (in_stage, in_all)


def test_looks_of_earlier_versions_and_values_that_are_not_finite():
    old = {name: value for name, value in look(10).items() if not name.startswith(("entropy", "overlap", "local", "n_not"))}
    entries = [{"stage": "warmup", "step": step} | values for step, values in ((10, old), (20, look(20)), (30, look(30)))]
    html = held_out_section(entries, has_plots=True)
    assert html.count("<svg") == 2 and "not finite" not in html
    check(html)
    only_old = held_out_section(entries[:1], has_plots=True)
    assert "held-out rows: coverage." in only_old
    bad = entries[2] | {"n_not_finite_layer_1": 5.0, "n_not_finite_layer_2": 9.0}
    assert "at warmup step 30, 5 queries have values that are not finite after layer 1" in held_out_section([bad], False)


def test_heat_maps_are_thinned_and_have_no_bitmaps():
    values = np.linspace(0, 1, 4 * 200).reshape(4, 200).tolist()
    svg = heat_maps([f"sparse {i}" for i in range(200)], {"coverage": values, "none": [[math.nan] * 200]}, name="x")
    assert "<image" not in svg and "sparse 199" not in svg.split("coverage")[0] and len(svg) < 300_000
    assert heat_maps(["a"], {"none": [[math.nan]]}, name="x") is None and heat_maps([], {}, name="x") is None


def test_differences_stand_beside_each_other_around_dense(tmp_path):
    series = {"sparse": [(0.1, 0.02), (None, None)], "window": [(0.2, None), (math.nan, 0.1)], "none": [(None, None)] * 2}
    svg = differences_by_row(["512", "2048"], series, ["dense", "sparse"], name="x", x_label="length", y_label="difference")
    for word in ("dense", "sparse", "window", "512", "2048"):
        assert f">{word}<" in svg
    assert ">none<" not in svg
    assert differences_by_row(["1"], {"none": [(None, None)]}, [], name="x", x_label="", y_label="") is None
    report = make_report()
    measured = [{"mean": 0.25, "standard_error": 0.05}] * 4
    report["loss_difference_by_position"] = {"sparse": measured}
    entry = {"accuracy": 0.5, "difference": {"mean": -0.1, "standard_error": 0.03}}
    for row in report["rows"][:2]:
        row["tasks"] = {"needle": {"accuracy": 0.5, "by_length": {"512": entry, "2048": entry}}}
    write_report(tmp_path, report)
    page = (tmp_path / "report.html").read_text()
    check(page)
    assert "minus dense (nats per token)" in page and "Difference to dense on needle by length." in page
