import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest

from dsa_jax.config.selections import BEFORE, eval_rows, row_meaning
from dsa_jax.report import page, plots
from dsa_jax.report.report import format_table, write_report
from dsa_jax.run.files import RunError
from dsa_jax.run.metrics import MetricsLog

NAMES = ["dense", "sparse", "sparse, untrained indexer", "window of the same budget", "oracle top-k"]


def make_report():
    accuracy, loss = [0.95, 0.93, 0.21, 0.14, 0.948], [2.31, 2.325, 2.71, 2.46, 2.312]
    coverage, keys = [1.0, 0.91, 0.18, 0.35, 0.95], [128.5, 15.6, 15.6, 15.6, 15.6]
    rows = [
        {"name": n, "recall_accuracy": a, "text_loss": t, "coverage": c, "keys_per_query": k}
        for n, a, t, c, k in zip(NAMES, accuracy, loss, coverage, keys, strict=True)
    ]
    return {
        "name": "a <b> run",
        "rows": rows,
        "stages": {
            "pretrain": {"steps": 2000, "seconds": 130.0, "compile_seconds": 5.5, "tokens": 2_000_000, "final": {"loss": 2.2}},
            "warmup": {"steps": 150, "seconds": 12.0, "compile_seconds": 3.0, "tokens": 614_400, "final": {"kl": 0.021}},
            "evaluate": {"seconds": 14.2},
        },
        "coverage_by_layer": {n: [c, min(1.0, c * 1.04)] for n, c in zip(NAMES, coverage, strict=True)},
        "loss_by_position": {
            "positions": np.array([32, 64, 96, 128]),
            **{n: [math.nan, t + 0.2, t, t - 0.1] for n, t in zip(NAMES, loss, strict=True)},
        },
        "config": {"name": "a <b> run", "train": {"steps": 3}},
        "environment": {"versions": {"jax": "0.10.2"}, "git": None, "history": []},
        "corpus": {"provenance": "standard <library>", "tokens": 123},
    }


def write_curves(directory, last=2000):
    with MetricsLog(directory / "metrics.jsonl") as log:
        for step in range(10, last + 1, 10):
            log.log("pretrain", step, {"loss": 2.2 + 3 * math.exp(-step / 300) + 0.05 * math.sin(step)})
        for step in range(10, 151, 10):
            log.log("warmup", step, {"kl": 1.5 * math.exp(-step / 30) + 0.02})
        for step in range(10, 151, 10):
            log.log("sparse", step, {"loss": 2.25 + 0.1 * math.exp(-step / 40), "kl": 0.05 * math.exp(-step / 50) + 0.01})


class Checker(HTMLParser):
    """Every tag closed in order, nothing fetched."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            assert name not in ("src", "srcset", "action") and not (name.endswith("href") and not value.startswith("#")), (
                tag,
                name,
            )
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def check(html):
    checker = Checker()
    checker.feed(html)
    assert checker.open == []
    assert not re.search(r"@import|url\((?!#)", html)
    return checker


def test_report_files(tmp_path):
    write_curves(tmp_path)
    write_report(tmp_path, make_report())
    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert report["rows"] == make_report()["rows"]
    assert report["loss_by_position"]["positions"] == [32, 64, 96, 128]
    assert report["loss_by_position"]["dense"][0] is None
    html = (tmp_path / "report.html").read_text()
    checker = check(html)
    text = " ".join(" ".join(checker.text).split())
    assert checker.tags.count("svg") == 6 and html.count('role="img"') == 6
    assert "a <b> run: what does sparse attention cost in quality?" in text and "standard <library>" in text
    assert "reads 15.6 keys per query instead of 128.5" in text
    assert "recall 93.0% instead of 95.0%" in text and "nats per token (+0.015)" in text
    assert "Recall accuracy by row: dense 0.950; sparse 0.930;" in html
    assert sorted(path.name for path in tmp_path.iterdir() if "report" in path.name) == ["report.html", "report.json"]


def test_same_input_same_page(tmp_path):
    write_curves(tmp_path, last=50)
    write_report(tmp_path, make_report())
    first = (tmp_path / "report.html").read_bytes()
    write_report(tmp_path, make_report())
    assert (tmp_path / "report.html").read_bytes() == first


def test_without_matplotlib_all_tables_and_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "is_installed", lambda package: False)
    write_curves(tmp_path, last=50)
    write_report(tmp_path, make_report())
    html = (tmp_path / "report.html").read_text()
    checker = check(html)
    assert "svg" not in checker.tags and checker.tags.count("table") == 6
    assert "pip install 'dsa-jax[plot]'" in " ".join(checker.text)


@pytest.mark.parametrize("has_plots", [True, False])
def test_least_report(tmp_path, monkeypatch, has_plots):
    monkeypatch.setattr(page, "is_installed", lambda package: has_plots)
    row = {"name": "dense", "recall_accuracy": None, "text_loss": None, "coverage": None, "keys_per_query": None}
    write_report(tmp_path, {"name": "least", "rows": [row]})
    checker = check((tmp_path / "report.html").read_text())
    assert "svg" not in checker.tags and checker.tags.count("table") == 1
    assert "were not both evaluated" in " ".join(checker.text)
    write_report(tmp_path, {"name": "least", "rows": [row], "remarks": ["topk <covers> all"]})
    assert '<p class="hint">topk &lt;covers&gt; all</p>' in (tmp_path / "report.html").read_text()
    write_report(tmp_path, {"name": "least", "rows": [row, {**row, "name": "sparse"}], "loss_by_position": {"positions": []}})
    assert "Nothing was measured" in (tmp_path / "report.html").read_text()


def test_unwritable_report(tmp_path):
    with pytest.raises(RunError, match="cannot write"):
        write_report(tmp_path / "absent", make_report())


def test_table_for_the_terminal():
    rows = make_report()["rows"][:2]
    rows[1]["text_loss"] = None
    assert format_table(rows) == "\n".join(
        [
            "row     recall accuracy  text loss  coverage  keys/query",
            "------  ---------------  ---------  --------  ----------",
            "dense             0.950      2.310     1.000       128.5",
            "sparse            0.930          -     0.910        15.6",
        ]
    )


def test_index_recall_has_a_column_where_a_row_has_it():
    rows = make_report()["rows"][:2]
    rows[1]["indexer_recall"] = 0.875
    assert format_table(rows).splitlines()[0::3] == [
        "row     recall accuracy  text loss  coverage  keys/query  index recall",
        "sparse            0.930      2.325     0.910        15.6         0.875",
    ]


def test_tasks_have_columns_and_their_groups_a_table(tmp_path):
    report = make_report()
    report["rows"] = report["rows"][:2]
    for row, accuracy in zip(report["rows"], (0.9, 0.4), strict=True):
        row["tasks"] = {
            "multi_needle": {"accuracy": accuracy, "loss": 0.3, "by_depth": [accuracy, math.nan, 0.123, 0.5]},
            "common_words": {"accuracy": 0.25, "loss": 1.0, "by_rank": [0.5, 0.0]},
        }
    assert format_table(report["rows"]).splitlines()[0::3] == [
        "row     recall accuracy  text loss  multi_needle  common_words  coverage  keys/query",
        "sparse            0.930      2.325         0.400         0.250     0.910        15.6",
    ]
    write_report(tmp_path, report)
    checker = check((tmp_path / "report.html").read_text())
    text = " ".join(" ".join(checker.text).split())
    assert "multi_needle: accuracy by depth row depth 0-25% depth 25-50%" in text and "sparse 0.400 - 0.123 0.500" in text
    assert "common_words: accuracy by rank row rank 1 rank 2" in text
    assert "share of queries answered, with records that nobody asks for" in text


def test_every_row_of_the_evaluation_is_explained_and_an_unknown_one_is_an_error():
    for row in (*eval_rows().values(), BEFORE):
        assert row_meaning(row.title) == row.meaning != ""
    with pytest.raises(KeyError, match="no selection explains the row 'sparser'"):
        row_meaning("sparser")


def test_plots_are_parsable_and_follow_the_page_colour():
    rows = make_report()["rows"]
    svg = plots.parity_bars(rows, "text_loss", "text loss (nats per token)")
    ElementTree.fromstring(svg)
    assert "currentColor" in svg and "#010203" not in svg and "<metadata" not in svg
    texts = re.findall(r">([^<>]+)</text>", svg)
    assert {"text loss (nats per token)", "2.325", *NAMES} <= set(texts)


def test_plots_leave_matplotlib_settings_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.parity_bars(make_report()["rows"], "coverage", "coverage", upper=1.0)
    assert dict(matplotlib.rcParams) == before


def test_nothing_to_draw():
    assert plots.training_curves([], "loss", ["warmup"], "loss") is None
    assert plots.parity_bars([{"name": "a", "text_loss": None}], "text_loss", "loss") is None
    assert plots.lines_by_row([1], {"a": [None]}, ["a"], name="x", x_label="x", y_label="y") is None


def test_curves_with_odd_values():
    entries = [{"stage": "warmup", "step": 1, "kl": math.nan}, {"stage": "warmup", "step": 2, "kl": 0.0}]
    svg = plots.training_curves(entries, "kl", ["warmup"], "KL", is_log=True)
    assert svg is not None and "warmup" in svg
    assert plots.training_curves(entries[:1], "kl", ["warmup"], "KL", is_log=True) is not None


def test_long_curves_are_thinned():
    entries = [{"stage": "sparse", "step": step, "loss": step % 7} for step in range(1, 20_001)]
    svg = plots.training_curves(entries, "loss", ["sparse"], "loss")
    assert svg is not None and len(svg) < 100_000
