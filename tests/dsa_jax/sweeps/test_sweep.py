import copy
import json

import pytest

from dsa_jax.config import Config, ConfigError
from dsa_jax.config.selections import BEFORE
from dsa_jax.params import is_indexer_path, nested_parameters, parameter_paths
from dsa_jax.run.files import RunError, claimed
from dsa_jax.sweeps import run as run_module
from dsa_jax.sweeps.plot import plot_ablation
from dsa_jax.sweeps.run import known_runs, run_ablation
from dsa_jax.sweeps.summary import answers, format_markdown
from dsa_jax.sweeps.sweep import Ablation, Variant, after_dense, dense_part, differences, run_key
from tests.dsa_jax.train.tiny import tiny_config

TOPK = "model.attention.indexer.topk"


def sweep(*variants, seeds=(0, 1), **stages):
    base = tiny_config(steps=2)
    base.eval.rows = ("dense", "sparse")
    for name, steps in stages.items():
        getattr(base.train, name).steps = steps
    return Ablation(name="sweep", question="How many?", axis="topk", seeds=seeds, base=base, variants=variants)


def test_a_run_is_known_by_what_it_computes_and_not_by_its_name():
    ablation = sweep(Variant("two", {TOPK: 2}), Variant("base"), Variant("as base", {TOPK: 4}))
    two, base, same = (ablation.config(variant, 0) for variant in ablation.variants)
    assert run_key(base) == run_key(same) != run_key(two)
    assert run_key(base) != run_key(ablation.config(ablation.variants[1], 1))
    muon = copy.deepcopy(base)
    muon.train.warmup.optimizer.name = "muon"
    assert run_key(muon) != run_key(base)
    slower_log = copy.deepcopy(base)
    slower_log.train.warmup.log_every = 99
    assert run_key(slower_log) == run_key(base)


def test_differences_leave_out_what_is_at_its_default():
    assert differences(Config()) == {}
    config = Config(seed=4)
    config.train.warmup.optimizer.learning_rate = 0.5
    assert differences(config) == {"seed": 4, "train.warmup.optimizer.learning_rate": 0.5}


def test_variants_share_their_dense_part_and_only_that():
    ablation = sweep(Variant("two", {TOPK: 2}), Variant("heads", {"model.attention.indexer.n_heads": 1}))
    parts = [dense_part(ablation.config(variant, 0)) for variant in ablation.variants]
    assert run_key(parts[0]) == run_key(parts[1])
    assert not parts[0].model.attention.indexer.enabled and parts[0].train.sparse.steps == 0
    parts[0].validate()
    rest = after_dense(ablation.config(ablation.variants[0], 0), "somewhere")
    assert rest.train.pretrain.steps == 0 and rest.init.checkpoint == "somewhere" and rest.train.warmup.steps == 2
    from_scratch = sweep(Variant("scratch", {"train.pretrain_attention": "sparse"}))
    assert dense_part(from_scratch.config(from_scratch.variants[0], 0)) is None
    only_pretrain = sweep(Variant("x"), warmup=0, sparse=0)
    assert dense_part(only_pretrain.config(only_pretrain.variants[0], 0)) is None


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ((), "0 variants"),
        ((Variant("a"), Variant("a")), "distinct"),
        ((Variant("a", {"model.attention.indexer.tpok": 2}),), "Did you mean 'topk'"),
        ((Variant("a", {"seed.topk": 2}),), "'topk' is unknown"),
        ((Variant("a", {TOPK: 0}),), "variant 'a': model.attention.indexer.topk is 0"),
        ((Variant("a", row="window"),), "Add it there"),
        ((Variant("a", change_params=lambda params, config: params),), "no name of its own"),
    ],
    ids=["none", "twice", "misspelt", "below-a-leaf", "invalid", "row-not-evaluated", "nameless-change"],
)
def test_a_sweep_that_cannot_run_says_so_before_anything_runs(tmp_path, variants, message):
    with pytest.raises(ConfigError, match=message):
        run_ablation(sweep(*variants), tmp_path / "runs", tmp_path / "results", command="test")
    assert not (tmp_path / "runs").exists()


def without_index_weights(params, config):
    return nested_parameters({path: x * (not is_indexer_path(path)) for path, x in parameter_paths(params).items()})


def test_a_sweep_trains_each_run_once_and_continues(tmp_path, monkeypatch):
    trained = []
    retrofit = run_module.retrofit

    def counted(config, workdir, **kwargs):
        trained.append((config.train.pretrain.steps, config.model.attention.indexer.topk))
        return retrofit(config, workdir, **kwargs)

    monkeypatch.setattr(run_module, "retrofit", counted)
    variants = (
        Variant("two", {TOPK: 2}, place=2),
        Variant("base", place=4),
        Variant("six", at_evaluation={TOPK: 6}, place=6),
        Variant("no scores", change_params=without_index_weights, place=7),
    )
    ablation = sweep(*variants, seeds=(0,))
    places = tmp_path / "runs", tmp_path / "results"
    first = run_ablation(ablation, *places, command="test")
    assert [steps for steps, _ in trained] == [2, 0, 0] and [topk for _, topk in trained[1:]] == [2, 4]
    assert [run["variant"] for run in first["runs"]] == ["two", "base", "six", "no scores"]
    assert first["variants"][3]["change_params"] == "without_index_weights"
    assert first == json.loads((places[1] / "sweep.json").read_text())

    assert run_ablation(ablation, *places, command="test") == first
    assert len(trained) == 3
    other = sweep(Variant("four keys", {TOPK: 4}), seeds=(0,))
    other.name = "other"
    assert run_ablation(other, *places, command="test")["runs"][0]["rows"] == first["runs"][1]["rows"]
    assert len(trained) == 3

    ablation.base.train.sparse.steps += 1
    with pytest.raises(ConfigError, match=r"sweep\.json holds 4 runs of other settings, such as 'two' with seed 0, which"):
        run_ablation(ablation, *places, command="test")
    assert len(trained) == 3 and first == json.loads((places[1] / "sweep.json").read_text())

    lines = answers(first)
    assert [line.name for line in lines] == [BEFORE.title, "two", "base", "six", "no scores"]
    keys, coverage = ([line.quantities[name].mean for line in lines[1:]] for name in ("keys per query", "attention mass kept"))
    assert keys[0] < keys[1] < keys[2] and keys[3] == keys[1] and coverage[3] != coverage[1]
    plot_ablation(first, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 5000


def finished(tmp_path):
    environment = {"python": "3", "versions": {"jax": "0"}, "device": {"count": 1, "kind": "cpu"}, "git": None}
    report = {"rows": [], "stages": {"sparse": {"seconds": 4.0, "compile_seconds": 2.0}}, "environment": environment}
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "report.json").write_text(json.dumps(report))
    return run_module._Trained(tmp_path / "run", None)


@pytest.mark.parametrize("kind", [RunError, ConfigError])
def test_a_run_that_fails_is_recorded_and_tried_again(tmp_path, monkeypatch, kind):
    def failing(config, workdir):
        raise kind("loss is nan at step 3")

    ablation = sweep(Variant("base"), seeds=(0,))
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_train", failing)
        result = run_ablation(ablation, tmp_path / "runs", tmp_path / "results", command="test")
    assert result["runs"][0]["failed"] == "loss is nan at step 3"
    assert "- base, seed 0: loss is nan at step 3" in format_markdown(result)

    monkeypatch.setattr(run_module, "_train", lambda config, workdir: finished(tmp_path))
    again = run_ablation(ablation, tmp_path / "runs", tmp_path / "results", command="test")
    assert "failed" not in again["runs"][0]


def test_a_signal_stops_the_sweep_and_keeps_what_is_done(tmp_path, monkeypatch):
    outcomes = iter([finished(tmp_path), None])
    monkeypatch.setattr(run_module, "_train", lambda config, workdir: next(outcomes))
    ablation = sweep(Variant("two", {TOPK: 2}), Variant("base"), seeds=(0,))
    assert run_ablation(ablation, tmp_path / "runs", tmp_path / "results", command="test") is None
    assert [run["variant"] for run in known_runs(tmp_path / "results")] == ["two"]


def test_one_process_at_a_sweep(tmp_path):
    with (
        claimed(tmp_path, ".sweep.lock"),
        pytest.raises(RunError, match=r"another process is using results .* another --results"),
    ):
        run_ablation(sweep(Variant("a")), tmp_path / "runs", tmp_path, command="")


def test_other_seeds_of_the_same_sweep_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "_train", lambda config, workdir: finished(tmp_path))
    places = tmp_path / "runs", tmp_path / "results"
    run_ablation(sweep(Variant("two", {TOPK: 2}), seeds=(0, 1)), *places, command="both")
    again = run_ablation(sweep(Variant("two", {TOPK: 2}), Variant("base"), seeds=(1,)), *places, command="one")
    assert again["seeds"] == [0, 1] and again["command"] == "both && one"
    assert [(run["variant"], run["seed"]) for run in again["runs"]] == [("two", 0), ("two", 1), ("base", 1)]
    assert again["runs"][0]["trained"] == [{"key": "run", "seconds": 6.0}]


def test_a_file_that_is_no_result_is_named(tmp_path):
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(RunError, match=r"x\.json is no result"):
        list(known_runs(tmp_path))


LONG = ["x" * 300, "ä" * 101, "🙂" * 60]  # more bytes than the name of a file has


@pytest.mark.parametrize("name", ["../../x", "a/b", "/x", "..", ".x", "", "a\0b", "a\nb", "\udcff", "a\\b", *LONG])
def test_a_sweep_is_named_like_a_file(tmp_path, name):
    ablation = sweep(Variant("base"))
    ablation.name = name
    with pytest.raises(ConfigError, match="expected the name of files in --results"):
        run_ablation(ablation, tmp_path / "runs", tmp_path / "results", command="test")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".md", ".png"])
def test_pages_of_no_sweep_are_not_replaced(tmp_path, suffix):
    (tmp_path / f"sweep{suffix}").write_text("mine")
    with pytest.raises(RunError, match=rf"sweep\{suffix} is of no sweep, since there is no sweep\.json"):
        run_ablation(sweep(Variant("base")), tmp_path / "runs", tmp_path, command="test")
    assert (tmp_path / f"sweep{suffix}").read_text() == "mine"


WHOLE = {"name": "n", "question": "q", "axis": "a", "command": "c", "seeds": [0], "runs": [],
         "variants": [{"name": "v", "row": "sparse", "place": None}]}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"variants": 3}, {"variants": [{"name": "v", "row": "no such row", "place": None}]}, {"seeds": "0"}, {"question": None},
        {"runs": [{"variant": "v", "seed": "0", "key": "k"}]}, {"runs": [3]},
        {"runs": [{"variant": "v", "seed": 0, "key": "k", "rows": [{"name": "sparse", "text_loss": "low"}]}]},
        {"runs": [{"variant": "v", "seed": 0, "key": "k", "rows": [{"name": "sparse", "tasks": {"mqar": 3}}]}]},
    ],
    ids=str,
)  # fmt: skip
def test_a_result_of_other_kinds_is_one_line(tmp_path, change):
    (tmp_path / "x.json").write_text(json.dumps(WHOLE))
    assert list(known_runs(tmp_path)) == []
    (tmp_path / "x.json").write_text(json.dumps(WHOLE | change))
    with pytest.raises(RunError, match=r"x\.json is no result of an ablation"):
        list(known_runs(tmp_path))


@pytest.mark.parametrize("report", ["[]", '{"rows": []}', '{"rows": [], "stages": {"sparse": 3}}', "[" * 100_000])
def test_a_report_of_a_run_of_other_kinds_is_one_line(tmp_path, report):
    (tmp_path / "report.json").write_text(report)
    with pytest.raises(RunError, match=r"report\.json is damaged .* Delete it, and the run is evaluated again"):
        run_module._finished(tmp_path)


def test_dense_models_that_differ_have_a_line_each():
    def run(variant, before):
        row = {"recall_accuracy": 0.5, "text_loss": None, "coverage": 0.5, "keys_per_query": 8.0}
        return {
            "variant": variant,
            "seed": 0,
            "rows": [row | {"name": BEFORE.title, "coverage": before}, row | {"name": "sparse"}],
        }

    def result(*before):
        runs = [run(variant, value) for variant, value in zip("ab", before, strict=True)]
        variants = [{"name": variant, "settings": {}, "row": "sparse", "place": None} for variant in "ab"]
        return {"name": "n", "question": "Why?", "axis": "kind", "variants": variants, "runs": runs, "seeds": [0]}

    assert [line.name for line in answers(result(0.9, 0.9))] == [BEFORE.title, "a", "b"]
    lines = answers(result(0.9, 0.8))
    assert [line.name for line in lines] == ["a, dense", "a", "b, dense", "b"]
    assert [line.quantities["attention mass kept"].mean for line in lines] == [0.9, 0.5, 0.8, 0.5]


def test_the_page_shows_means_and_spreads():
    environment = {"device": {"count": 1, "kind": "cpu"}, "python": "3", "versions": {"jax": "0"}}

    def run(variant, seed, accuracy):
        row = {"recall_accuracy": accuracy, "text_loss": None, "coverage": 0.5, "keys_per_query": 8.0}
        trained = [{"key": "dense", "seconds": 90.0}, {"key": f"{variant}{seed}", "seconds": 30.0}]
        rows = [{"name": BEFORE.title, **row, "recall_accuracy": 1.0}, {"name": "sparse", **row}]
        return {"variant": variant, "seed": seed, "rows": rows, "trained": trained, "environment": environment}

    result = {
        "name": "n", "question": "Why?", "axis": "kind", "command": "c", "seeds": [0, 1],
        "variants": [{"name": "a", "settings": {}, "row": "sparse", "place": None}],
        "runs": [run("a", 0, 0.9), run("a", 1, 0.8)],
    }  # fmt: skip
    page = format_markdown(result)
    assert "| a | 0.850 ± 0.050 | 0.500 ± 0.000 | 8.000 ± 0.000 |" in page
    assert f"| {BEFORE.title} | 1.000 ± 0.000 |" in page
    assert "2 runs in 2 minutes" in page and "1 x cpu, Python 3, jax 0." in page
