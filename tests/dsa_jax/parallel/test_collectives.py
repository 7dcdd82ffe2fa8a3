"""What the compiler moves between devices."""

import re

import jax
import numpy as np

from dsa_jax.data.batch import Batch
from dsa_jax.model import build_model, init_params
from dsa_jax.parallel.placement import place, place_batch
from dsa_jax.train.loss import forward_with_loss
from tests.dsa_jax.parallel.meshes import mesh
from tests.dsa_jax.train.tiny import tiny_config

VOCAB, LENGTH = 328, 16


def test_logits_and_the_table_stay_split_over_the_vocabulary():
    config = tiny_config("gqa").model
    config.vocab_size, config.n_layers = VOCAB, 1
    config.attention.n_heads = config.attention.n_kv_heads = 8
    model = build_model(config)
    params = init_params(model, jax.random.key(0))
    ids = np.random.default_rng(0).integers(0, VOCAB, (2, LENGTH)).astype(np.int32)
    batch = Batch(ids, np.roll(ids, -1, axis=1), np.ones(ids.shape, bool), np.ones_like(ids))

    def loss(params, batch):
        per_token = forward_with_loss(model, params, batch, attention="dense")[1]
        return per_token.nll.sum(), per_token.correct.sum()

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (expected, hits), _ = step(params, batch)
    with jax.set_mesh(mesh("tp8")):
        arguments = place(params), place_batch(batch)
        program = step.lower(*arguments).compile().as_text()
        (found, found_hits), _ = step(*arguments)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found_hits == hits
    moved = re.findall(r"= (\S+) (?:all-gather|all-to-all)", program)
    sizes = [[int(n) for n in re.findall(r"\d+", shape.split("[", 1)[1].split("]", 1)[0])] for shape in moved]
    assert not [shape for shape in sizes if VOCAB in shape], program
