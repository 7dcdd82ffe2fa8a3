"""Most of these tests spend their time tracing and compiling, so they compile without optimisation, and may trace once."""

import functools

import jax
import pytest

from dsa_jax.config import to_dict


@pytest.fixture(autouse=True, scope="module")
def compile_quickly():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def traced_once():
    """Runs of the module that train or evaluate the same model in the same way share the step, a pure function."""
    from dsa_jax.evals import parity
    from dsa_jax.train import loop

    make, steps = loop.make_train_step, {}

    def make_train_step(model, stage, config):
        settings = to_dict(config)
        key = model, stage.name, stage.attention, repr((settings["train"], settings["model"]))
        if key not in steps:
            steps[key] = make(model, stage, config)
        return steps[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_train_step", make_train_step)
        patch.setattr(parity, "make_eval_step", functools.cache(parity.make_eval_step))
        yield


@pytest.fixture
def undrawn(monkeypatch):
    """Reports without their page, whose plots take longer than a short run."""
    monkeypatch.setattr("dsa_jax.report.report.render_page", lambda *_, **__: "")
