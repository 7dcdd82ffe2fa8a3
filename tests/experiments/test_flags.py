import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from dsa_jax.config import Config, ConfigError
from dsa_jax.extras import MissingExtraError
from dsa_jax.run.files import RunError
from experiments.flags import ConfigFlag, parse_flags, run_main
from experiments.recipes import load_config, parse_value, recipe_fields

RECIPE = """
from dsa_jax.config import Config

def get_config(arg=""):
    config = Config(name=arg or "recipe", seed=5)
    config.train.warmup.steps = 10
    return config
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(RECIPE)
    return path


def parse(*arguments, default=None):
    values = flags.FlagValues()
    holder = ConfigFlag(default, flag_values=values)
    parse_flags(["command", *arguments], values)
    return holder.value


def failure(capsys, status, call):
    with pytest.raises(SystemExit) as stopped:
        call()
    assert stopped.value.code == status
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_recipe_with_and_without_argument(recipe):
    assert parse(f"--config={recipe}").seed == 5
    assert parse(default=str(recipe)).name == "recipe"
    assert parse("--config", f"{recipe}:other").name == "other"


@pytest.mark.parametrize(
    ("arguments", "field", "expected"),
    [
        (["--config.train.warmup.steps=100"], "train.warmup.steps", 100),
        (["--config.train.warmup.steps", "1_000"], "train.warmup.steps", 1000),
        (["--config.seed=-3"], "seed", -3),
        (["--config.seed", "-3"], "seed", -3),
        (["--config.seed=1", "--config.seed=2"], "seed", 2),
        (["--config.train.sparse.optimizer.learning_rate=1e-4"], "train.sparse.optimizer.learning_rate", 1e-4),
        (["--config.train.sparse.optimizer.learning_rate=1"], "train.sparse.optimizer.learning_rate", 1.0),
        (["--config.model.tie_embeddings=false"], "model.tie_embeddings", False),
        (["--config.model.tie_embeddings", "True"], "model.tie_embeddings", True),
        (["--config.name=3"], "name", "3"),
        (["--config.data.text.path="], "data.text.path", ""),
        (["--config.train.pretrain.curriculum=((1500,64),(1800,128))"], "train.pretrain.curriculum", ((1500, 64), (1800, 128))),
        (["--config.train.pretrain.curriculum=[[5, 64]]"], "train.pretrain.curriculum", ((5, 64),)),
        (["--config.train.pretrain.curriculum=()"], "train.pretrain.curriculum", ()),
        (["--config.eval.rows", "('dense','sparse')"], "eval.rows", ("dense", "sparse")),
        (["--config.eval.rows=('dense',)"], "eval.rows", ("dense",)),
    ],
)
def test_overrides(recipe, arguments, field, expected):
    value = parse(f"--config={recipe}", *arguments)
    for part in field.split("."):
        value = getattr(value, part)
    assert value == expected and type(value) is type(expected)


def test_overrides_before_the_recipe_and_each_value_is_new(recipe):
    values = flags.FlagValues()
    holder = ConfigFlag(flag_values=values)
    parse_flags(["command", "--config.seed=9", f"--config={recipe}"], values)
    first = holder.value
    first.seed = 1
    assert holder.value.seed == 9


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.train.warmup.steps=ten", "config.train.warmup.steps is 'ten'; expected a whole number."),
        ("--config.train.warmup.steps=1.5", "config.train.warmup.steps is '1.5'; expected a whole number."),
        ("--config.train.warmup.steps=", "config.train.warmup.steps is ''; expected a whole number."),
        ("--config.data.recall_fraction=nan", "config.data.recall_fraction is 'nan'; expected a finite number."),
        ("--config.model.tie_embeddings=yes", "config.model.tie_embeddings is 'yes'; expected true or false."),
        ("--config.eval.rows=dense", "config.eval.rows is 'dense'; expected a tuple like ('name',)."),
        ("--config.eval.rows=('dense')", "expected a tuple like ('name',)."),
        ("--config.eval.rows=(1,)", "expected a tuple like ('name',)."),
        ("--config.train.pretrain.curriculum=((1,2,3),)", "expected a tuple like ((8, 8),)."),
        ("--config.train.pretrain.curriculum=((1,2.5),)", "expected a tuple like ((8, 8),)."),
        ("--config.train.pretrain.curriculum=((1,", "expected a tuple like ((8, 8),)."),
    ],
)
def test_value_of_the_wrong_kind(recipe, argument, message):
    with pytest.raises(ConfigError) as error:
        parse(f"--config={recipe}", argument)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.train.warmup.stpes=3"], "unknown field config.train.warmup.stpes; did you mean config.train.warmup.steps?"),
        (["--config.train.warmup.stpes", "3"], "did you mean config.train.warmup.steps?"),
        (["--config.zzz=3"], "unknown field config.zzz; --helpfull lists all."),
        (["--confg=x.py"], "unknown flag --confg; did you mean --config?"),
        (["--config.data.recall=3"], "config.data.recall is a section; set one of its fields: config.data.recall.n_keys, "),
        (["--config.seed"], "Missing value for flag --config.seed"),
    ],
)
def test_unknown_names_exit_with_2_and_the_nearest(capsys, arguments, message):
    assert message in failure(capsys, 2, lambda: parse(*arguments))


def test_every_field_round_trips_through_its_flag(recipe):
    for name, kind, default, _ in recipe_fields(Config):
        assert parse_value(name, str(default), kind) == default, name


def test_missing_recipe_lists_the_available_ones(recipe, monkeypatch):
    with pytest.raises(ConfigError, match=r"there is no file .*tyni\.py\. Available: .*tiny\.py"):
        load_config(str(recipe.with_name("tyni.py")))
    (recipe.parent / "configs").mkdir()
    (recipe.parent / "configs" / "small.py").write_text(RECIPE)
    monkeypatch.chdir(recipe.parent)
    with pytest.raises(ConfigError, match=r"--config is not given.*Available: configs/small\.py\."):
        parse()
    with pytest.raises(ConfigError, match=r"Available: configs/small\.py\."):
        load_config("nowhere/x.py")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.py", "x = 1", r"has no function get_config"),
        ("a.py", "def get_config(arg=''): return {}", r"returned a dict; expected a dsa_jax\.config\.recipe\.Config"),
        ("a.txt", "", r"is no Python file"),
        ("a.py:small", "def get_config(): return None", r"takes no argument\. Leave out ':small'"),
        ("a.py:x", "def get_config(arg=''): raise ValueError('no such size')", r"a\.py:x: no such size"),
        ("a.py", "def get_config(arg): return None", r"needs an argument\. Give --config=.*a\.py:ARG"),
        ("a.py", "import nowhere", r"a\.py, line 1: ModuleNotFoundError: No module named 'nowhere'"),
        ("a.py", "\n\ndef get_config():\n  return 1 +", r"a\.py, line 4: SyntaxError"),
        ("a.py", "def get_config():\n  return {}.x", r"a\.py, line 2: AttributeError"),
        ("a.py", "class Ablation: pass\nget_config = Ablation().__class__", r"Ablation.*Sweeps are for experiments\.ablate"),
    ],
    ids=[
        *(
            "no_function",
            "dict",
            "suffix",
            "no_argument",
            "wrong_argument",
            "missing_argument",
            "import",
            "syntax",
            "attribute",
        ),
        "sweep",
    ],
)
def test_file_that_is_no_recipe(tmp_path, name, text, message):
    (tmp_path / name.partition(":")[0]).write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(str(tmp_path / name))


MAIN = """
import sys
from experiments.flags import ConfigFlag, run_main
from dsa_jax.config import ConfigError
from dsa_jax.run.files import RunError
CONFIG = ConfigFlag()

def main(argv):
    config = CONFIG.value
    config.validate()
    if config.name == "run": raise RunError("disk\\nfull")
    if config.name == "bug": raise ZeroDivisionError
    print("steps", config.train.warmup.steps, "jax" in sys.modules)

if __name__ == "__main__":
    run_main(main)
"""


@pytest.fixture
def command(tmp_path, recipe):
    script = tmp_path / "command.py"
    script.write_text(MAIN)

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-W", "error", str(script), *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )

    return run


def test_command_line_as_a_user_sees_it(command):
    fine = command("--config=tiny.py", "--config.train.warmup.steps", "0")
    assert (fine.returncode, fine.stdout, fine.stderr) == (0, "steps 0 False\n", "")
    for arguments, status, message in [
        (["--config=tiny.py"], 2, "train.warmup.steps is positive, but the model has no indexer"),
        (["--config=tiny.py", "--config.sed=1"], 2, "did you mean config.seed?"),
        (["--config=tiny.py", "--config.train.warmup.steps=0", "--config.name=run"], 1, "error: disk full\n"),
        (["--config=tiny.py", "stray"], 2, "unexpected argument 'stray'"),
    ]:
        done = command(*arguments)
        assert done.returncode == status and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    bug = command("--config=tiny.py", "--config.train.warmup.steps=0", "--config.name=bug")
    assert bug.returncode == 1 and "Traceback" in bug.stderr and "ZeroDivisionError" in bug.stderr


def test_help_lists_every_field_with_its_comment(command):
    text = " ".join(command("--helpfull").stdout.split())
    for name, kind, _, comment in recipe_fields(Config):
        assert f"--config.{name}:" in text
        assert comment and ("; " in comment or kind not in (int, float)), f"{name} has a limit at most"
    assert "--config.model.attention.indexer.topk: a whole number, 2048 unless the recipe sets it. k in the paper" in text


def test_help_of_a_command_shows_its_shared_flags_and_is_no_error(command):
    done = command("--help")
    assert done.returncode == 0 and "--config:" in done.stdout and "see --helpfull" in done.stdout


def test_errors_inside_main_are_one_line(capsys, monkeypatch):
    def fails(error):
        def main(argv):
            raise error

        return lambda: run_main(main, argv=["command"])

    monkeypatch.setattr("experiments.flags.app.run", lambda main, argv, flags_parser: sys.exit(main(argv)))
    assert failure(capsys, 2, fails(ConfigError("bad\nfield"))) == "error: bad field\n"
    assert failure(capsys, 1, fails(RunError("no space"))) == "error: no space\n"
    assert failure(capsys, 1, fails(MissingExtraError("Run: pip install x"))) == "error: Run: pip install x\n"
    assert failure(capsys, 2, fails(flags.ValidationError("--lengths"))) == "error: --lengths\n"
    assert failure(capsys, 130, fails(KeyboardInterrupt())).startswith("error: interrupted; ")
    with pytest.raises(ZeroDivisionError):
        fails(ZeroDivisionError())()
