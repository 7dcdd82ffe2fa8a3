"""The committed results: every page follows from the file that it is made of."""

import json
from pathlib import Path

import pytest

from dsa_jax.sweeps.page import PAGE, SWEEPS, render_results
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
    recipe = load_config(f"configs/ablations/{path.stem}.py", Ablation)
    assert [variant.name for variant in recipe.variants] == [variant["name"] for variant in result["variants"]]
    keys = {recipe.key(variant, seed) for variant in recipe.variants for seed in result["seeds"]}
    assert {run["key"] for run in result["runs"]} <= keys


def test_every_recipe_of_a_sweep_can_run():
    for path in sorted(Path("configs/ablations").glob("[!_]*.py")):
        load_config(str(path), Ablation).validate()
