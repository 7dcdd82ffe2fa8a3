"""A model that learns recall in seconds, and its three training stages, for the notebooks."""

import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from configs import quickstart
from dsa_jax.config import STAGES, Config
from dsa_jax.data import EvalData, TrainData, make_data
from dsa_jax.model import Transformer, build_model, init_params
from dsa_jax.params import nested_parameters, parameter_paths
from dsa_jax.sweeps.sweep import run_key
from dsa_jax.train.stages import stage_of
from dsa_jax.train.step import init_state, make_train_step
from experiments.notebooks.settings import SMALL

Params = dict[str, Any]
Curve = dict[str, list[float]]


def recipe() -> Config:
    """The quickstart's model on recall alone, 8 of 64 keys: 16 possible keys with 4 values each, 8 records in a row."""
    config = quickstart.get_config()
    config.name = "notebook"
    config.data.recall_fraction = 1.0
    recall = config.data.recall
    recall.n_keys, recall.n_values, recall.n_fillers, recall.tokens_per_record = 16, 4, 16, 8
    config.model.attention.qk_norm = True  # it learns to look up in a quarter of the steps
    config.model.attention.indexer.topk = 8
    config.eval.recall_len, config.eval.text_sequences = 64, 0
    config.eval.recall_sequences = 16 if SMALL else 128
    for name, steps in (("pretrain", 600), ("warmup", 200), ("sparse", 100)):
        stage = getattr(config.train, name)
        stage.curriculum, stage.seq_len, stage.steps = (), 64, 3 if SMALL else steps
    config.validate()
    return config


def data_of(config: Config) -> tuple[TrainData, EvalData]:
    """Training batches and held-out ones."""
    return make_data(config.data, config.seed, config.model.vocab_size)


def train_stage(config: Config, name: str, model: Transformer, params: Params, data: TrainData) -> tuple[Params, Curve]:
    """Run one stage: the parameters after it, and every metric by step. `params` stay usable."""
    settings, stage = getattr(config.train, name), stage_of(config, name)
    step = make_train_step(model, stage, config)
    state = init_state(jax.tree.map(lambda x: x.copy(), params), stage, settings)
    first = sum(getattr(config.train, earlier).n_steps for earlier in STAGES[: STAGES.index(name)])
    entries = []
    for i in range(settings.n_steps):
        state, metrics = step(state, data.batch(first + i, batch_size=settings.batch_size, seq_len=settings.seq_len))
        entries.append(metrics)
    entries = jax.device_get(entries)
    return state.params, {key: [float(entry[key]) for entry in entries] for key in entries[0] if np.ndim(entries[0][key]) == 0}


def trained(config: Config) -> tuple[Transformer, dict[str, Params]]:
    """The model, and its parameters after each stage ("init", "pretrain", "warmup", "sparse").

    They are kept in the directory for temporary files, by recipe, so that several notebooks train once.
    """
    model = build_model(config.model)
    folder = Path(tempfile.gettempdir()) / "dsa-jax-notebooks" / run_key(config)
    params = {"init": init_params(model, jax.random.key(config.seed))}
    last = params["init"]
    data, _ = data_of(config)
    for name in STAGES:
        path = folder / f"{name}.npz"
        if path.exists():
            with np.load(path) as stored:
                last = nested_parameters({key: jax.numpy.asarray(stored[key]) for key in stored.files})
        else:
            last, _ = train_stage(config, name, model, last, data)
            folder.mkdir(parents=True, exist_ok=True)
            unfinished = folder / f"{name}.part.npz"
            arrays: dict[str, Any] = jax.device_get(parameter_paths(last))
            np.savez(unfinished, **arrays)
            unfinished.replace(path)
        params[name] = last
    return model, params
