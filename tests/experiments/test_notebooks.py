"""The notebooks run, their two forms are in step, and a reader finds labelled figures in them."""

import base64
import copy
import importlib
import json
import re
import sys
import tempfile
from pathlib import Path

import matplotlib
import pytest

from configs.ablations import base
from dsa_jax.sweeps.sweep import Ablation, Variant
from experiments.notebooks.build import FOLDER, NAMES, main

HELPERS = {"__init__", "build", "settings", "small_model"}


def cells_of_source(name):
    """(kind, text) of the cells of NAME.py."""
    cells = []
    for part in re.split(r"^# %%", (FOLDER / f"{name}.py").read_text(), flags=re.MULTILINE)[1:]:
        head, _, text = part.partition("\n")
        if head.strip() == "[markdown]":
            cells.append(("markdown", re.sub(r"^# ?", "", text.strip(), flags=re.MULTILINE)))
        else:
            cells.append(("code", text.strip()))
    return cells


def notebook(name):
    return json.loads((FOLDER / f"{name}.ipynb").read_text())


def outputs(name):
    return [output for cell in notebook(name)["cells"] for output in cell.get("outputs", ())]


def test_every_notebook_is_listed():
    assert {path.stem for path in FOLDER.glob("*.py")} == {*NAMES, *HELPERS}
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_both_forms_hold_the_same_cells(name):
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook(name)["cells"]]
    assert cells == cells_of_source(name), f"run: python -m experiments.notebooks.build {name}"
    assert cells[0][0] == "markdown" and cells[0][1].startswith("# ")


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_whole(name):
    counts = [cell["execution_count"] for cell in notebook(name)["cells"] if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
    images = [output["data"]["image/png"] for output in outputs(name) if "image/png" in output.get("data", {})]
    assert images and all(base64.b64decode(image).startswith(b"\x89PNG") for image in images)
    assert not [output for output in outputs(name) if output["output_type"] == "error" or output.get("name") == "stderr"]
    shown = (FOLDER / f"{name}.py").read_text() + json.dumps([o for o in outputs(name) if "image/png" not in o.get("data", {})])
    assert not re.search(r"(?<![\w.])/(home|tmp|root|work|Users|usr|opt|var)/", shown)


@pytest.fixture
def results(tmp_path):
    """A sweep along an axis with a failed run, and one by name that no recipe of this project has."""
    topk = importlib.import_module("configs.ablations.topk").get_config()
    other = Ablation("made_up", "Does a name matter?", "name", (0,), base(), (Variant("one"), Variant("two")))
    for ablation in (topk, other):
        runs = []
        for i, variant in enumerate(ablation.variants):
            rows = [
                {"name": row, "recall_accuracy": 0.9 - 0.1 * i * (row == "sparse"), "text_loss": 1.5, "coverage": 0.5,
                 "keys_per_query": 4.0} for row in ("dense, before sparse training", "sparse")
            ]  # fmt: skip
            done = {"rows": rows, "seconds": 60.0} if i or ablation is other else {"failed": "no disk"}
            runs.append({"variant": variant.name, "seed": 0, "key": "k", **done})
        content = {
            "name": ablation.name,
            "question": ablation.question,
            "axis": ablation.axis,
            "command": "python -m experiments.ablate",
            "seeds": [0],
            "variants": [{"name": v.name, "row": v.row, "place": v.place} for v in ablation.variants],
            "runs": runs,
        }
        (tmp_path / f"{ablation.name}.json").write_text(json.dumps(content))
    return tmp_path


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Where notebooks find what another has trained."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def small(monkeypatch, results, kept):
    """The environment of a notebook at small size: settings read anew, parameters kept in a directory of the test run."""
    monkeypatch.setenv("NOTEBOOK_SMALL", "1")
    monkeypatch.setenv("NOTEBOOK_RESULTS", str(results))
    for module in ("settings", "small_model"):
        monkeypatch.delitem(sys.modules, f"experiments.notebooks.{module}", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(kept))
    matplotlib.use("Agg")


@pytest.mark.slow
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", NAMES)
def test_runs_at_small_size(name, monkeypatch, capsys):
    import matplotlib.pyplot as plt

    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.extend(map(plt.figure, plt.get_fignums())))
    with plt.ioff():
        source = FOLDER / f"{name}.py"
        exec(compile(source.read_text(), str(source), "exec"), {"__name__": name})
        figures = [plt.figure(number) for number in plt.get_fignums()]
    assert len(figures) >= 3
    for figure in figures:
        figure.canvas.draw()
        title = figure.get_suptitle()
        assert title.endswith("?"), title
        panels = [panel for panel in figure.axes if panel.get_visible()]
        assert panels
        for panel in panels:
            # A colour bar has one axis; panels that share an axis show its label once.
            assert panel.get_xlabel() or panel.get_ylabel(), title
        assert any(panel.get_xlabel() for panel in panels), title
    text = capsys.readouterr().out
    if name == "ablations":
        assert "missing: activation" in text and "finished in part: topk" in text and "| two |" in text
    plt.close("all")


@pytest.mark.slow
def test_small_model_is_kept_and_read_back(small, monkeypatch):
    """A second call trains nothing and gives the same numbers."""
    module = importlib.import_module("experiments.notebooks.small_model")
    config = module.recipe()
    _, first = module.trained(config)
    monkeypatch.setattr(module, "train_stage", lambda *_: pytest.fail("trained twice"))
    _, second = module.trained(copy.deepcopy(config))
    leaves = [importlib.import_module("jax").tree.leaves(stages["sparse"]) for stages in (first, second)]
    assert all((a == b).all() for a, b in zip(*leaves, strict=True))
    assert [path.name for path in sorted(Path(tempfile.gettempdir()).glob("dsa-jax-notebooks/*/*"))] == [
        "pretrain.npz",
        "sparse.npz",
        "warmup.npz",
    ]


def test_help_is_no_notebook(capsys):
    assert main(["--help"]) == main(["-h"]) == 0
    assert capsys.readouterr().out.count("experiments.notebooks.build costs") == 2
    assert main(["--halp"]) == 2
