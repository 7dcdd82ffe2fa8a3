"""The committed results: every page follows from the file that it is made of."""

import json
import os
from pathlib import Path

import pytest

from dsa_jax.run.files import RunError
from dsa_jax.sweeps.page import PAGE, SWEEPS, render_results, write_results
from dsa_jax.sweeps.summary import format_markdown
from dsa_jax.sweeps.sweep import Ablation
from experiments.recipes import load_config

RESULTS = Path(__file__).parents[3] / "experiments" / "results"
FILES = sorted((RESULTS / SWEEPS).glob("*.json"))


def test_the_page_of_all_results_is_up_to_date():
    assert (RESULTS / PAGE).read_text() == render_results(RESULTS), "Run python -m experiments.summarize."


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_sweep_has_its_page_its_plot_and_a_recipe_with_its_variants(path):
    result = json.loads(path.read_text())
    assert path.with_suffix(".md").read_text() == format_markdown(result)
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert result["command"].startswith("python -m experiments.ablate --config=configs/ablations/")
    recipe_file = Path(f"configs/ablations/{path.stem}.py")
    assert recipe_file.exists() == ("revision" not in result)
    if "revision" in result:
        return
    recipe, kept = load_config(str(recipe_file), Ablation), [v["name"] for v in result["variants"] if "revision" not in v]
    assert [variant.name for variant in recipe.variants] == kept
    keys = {recipe.key(variant, seed) for variant in recipe.variants for seed in result["seeds"]}
    assert {run["key"] for run in result["runs"] if run["variant"] in kept} <= keys


def test_every_recipe_of_a_sweep_can_run():
    for path in sorted(Path("configs/ablations").glob("[!_]*.py")):
        load_config(str(path), Ablation).validate()


@pytest.mark.parametrize("kind", ["not text", "directory", "dangling link", "fifo"])
def test_a_page_beside_it_that_cannot_be_read_is_one_line(tmp_path, kind):
    page = tmp_path / "costs.md"
    if kind == "not text":
        page.write_bytes(b"\xff\xfe")
    elif kind == "directory":
        page.mkdir()
    elif kind == "fifo":
        os.mkfifo(page)
    else:
        page.symlink_to(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"costs\.md is no page that can be read \(.*\)\. Move it away"):
        write_results(tmp_path)
    assert not (tmp_path / PAGE).exists()


def test_a_page_that_quotes_ours_is_not_replaced(tmp_path):
    ours = write_results(tmp_path)
    theirs = f"# My project\n\nIts results begin:\n\n{ours.read_text()}"
    ours.write_text(theirs)
    with pytest.raises(RunError, match="is not a page of results"):
        write_results(tmp_path)
    assert ours.read_text() == theirs


@pytest.mark.parametrize("kind", ["text", "empty", "link", "directory"])
def test_a_page_of_somebody_else_is_not_replaced(tmp_path, kind):
    page = tmp_path / "results" / PAGE
    page.parent.mkdir()
    (tmp_path / "theirs").write_text((RESULTS / PAGE).read_text())
    if kind == "directory":
        page.mkdir()
    elif kind == "link":
        page.symlink_to(tmp_path / "theirs")
    else:
        page.write_text("# My project\n" if kind == "text" else "")
    with pytest.raises(RunError, match=r"README\.md (is not a page of results|would be replaced, and cannot be read)"):
        write_results(page.parent)
    assert kind != "text" or page.read_text() == "# My project\n"


def test_its_own_page_is_written_anew(tmp_path):
    page = write_results(tmp_path)
    page.write_text(page.read_text() + "old")
    assert write_results(tmp_path).read_text() == render_results(tmp_path)
    with pytest.raises(RunError, match="is no directory"):
        write_results(tmp_path / "nowhere")
