# %% [markdown]
# # Parity and its limits
#
# Sparse attention matches dense attention when the selected keys hold what the model needs. This notebook looks at when
# that is so (enough keys, a trained indexer), what rounding changes, and where no selection can work.

# %%
import copy

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from dsa_jax import build_model
from dsa_jax.evals.attention_maps import attention_maps
from dsa_jax.evals.parity import evaluate_parity
from experiments.notebooks.settings import SMALL
from experiments.notebooks.small_model import data_of, recipe, trained
from pallas_kernels import Visible, attention_topk, dense_attention, sparse_attention

config = recipe()
params = trained(config)[1]
held_out = data_of(config)[1]
length = config.eval.recall_len

# %% [markdown]
# ## How many keys are enough?
#
# One trained model, evaluated with other numbers of selected keys. It was trained with 8. The oracle selects by the true
# attention, which costs dense attention: it is what a perfect indexer would reach.

# %%
ROWS = ("sparse", "oracle", "untrained", "window")
found: dict[int, dict[str, dict]] = {}
for topk in (8,) if SMALL else (1, 2, 4, 8, 16, 32):
    changed = copy.deepcopy(config)
    changed.model.attention.indexer.topk = topk
    changed.eval.rows = ROWS if found else ("dense", *ROWS)
    table = evaluate_parity(build_model(changed.model), params["sparse"], held_out, changed)
    found[topk] = {row["name"]: row for row in table.rows}
dense = next(iter(found.values()))["dense"]

figure, panels = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
figure.suptitle("How many keys does recall need?")
for panel, column, label in (
    (panels[0], "recall_accuracy", "share of held-out answers right"),
    (panels[1], "coverage", "share of attention mass that is read"),
):
    for name, style in zip((name for name in found[8] if name != "dense"), ("o-", "^--", "s-", "D-"), strict=True):
        panel.plot(list(found), [rows[name][column] for rows in found.values()], style, label=name, markersize=5)
    panel.axhline(dense[column], color="black", linestyle=":", label="dense, all keys")
    panel.set_xscale("log", base=2)
    panel.set_xticks(list(found), [str(topk) for topk in found])
    panel.set(xlabel=f"keys per query, of {length}", ylabel=label, ylim=(0, 1.05))
    panel.grid(alpha=0.3)
panels[0].legend(frameon=False, fontsize=8)

# %% [markdown]
# The untrained indexer is the first limit: the same weights, the same budget, and keys chosen by random projections.
# Parity is a property of the trained indexer, not of sparsity.
#
# ## What does rounding change?
#
# Index scores near the cut are close together, so a lower precision selects a few other keys. Below, the first layer's
# selection is compared between float32 and two roundings: index queries and keys in e4m3, and the whole model in
# bfloat16. The second layer is left out, because its input already differs.


# %%
def variant(**changes):
    """The recipe's model with some fields of the model or of its indexer changed."""
    changed = copy.deepcopy(config.model)
    for name, value in changes.items():
        setattr(changed if hasattr(changed, name) else changed.attention.indexer, name, value)
    return build_model(changed)


batch = next(held_out.recall_batches(16, length, 16))
ids, last = jnp.asarray(batch.input_ids), params["sparse"]


def picks(model):
    """Mask of the keys that the first layer selects, [B, T, S]."""
    chosen = jax.jit(lambda p: model.apply({"params": p}, ids, attention="sparse", return_topk_indices=True).topk_indices)(last)
    return np.asarray(jax.nn.one_hot(chosen[0], length).sum(-2) > 0)


exact = picks(variant())
attention = np.asarray(jax.jit(lambda p: attention_maps(variant(), p, ids))(last)[0].attention)
crowded = np.arange(length) >= config.model.attention.indexer.topk  # the others select all they see
flips = {}
for name, model in {"e4m3 index": variant(fp8=True), "bfloat16 model": variant(dtype="bfloat16")}.items():
    lost = (exact & ~picks(model))[:, crowded]
    mass = np.where(lost, attention[:, crowded], 0).sum() / np.where(exact, attention, 0)[:, crowded].sum()
    flips[name] = 100 * lost.sum() / exact[:, crowded].sum(), 100 * mass

figure, panel = plt.subplots(figsize=(7, 3.2), layout="constrained")
figure.suptitle("Which picks does rounding change, and do they matter?")
places = np.arange(len(flips))
for offset, kind, label in ((-0.2, 0, "selected keys that changed"), (0.2, 1, "attention mass on those keys")):
    bars = panel.bar(places + offset, [values[kind] for values in flips.values()], 0.4, label=label)
    panel.bar_label(bars, fmt="%.2f")
panel.set_xticks(places, list(flips))
panel.set(xlabel="precision", ylabel="percent of the float32 selection")
panel.margins(y=0.2)
panel.legend(frameon=False)

# %% [markdown]
# Hence selections of different precisions must not be compared key by key through a deep model: one changed key changes
# the next layer's input. Compare layer by layer on the same input, or compare what the model answers.
#
# ## Where must top-k fail?
#
# If the answer is an average over many keys (counting, finding the commonest word), attention is broad, and no choice of
# a few keys holds most of it. Here queries and keys are random and only the sharpness of attention changes. Keys are
# chosen by the oracle, so the error is that of selecting at all. `ablations.ipynb` has the sweep of trained models on
# such tasks.

# %%
n_keys, n_queries, dim = 256, 64, 32
rng = np.random.default_rng(0)
q, k, v = (jnp.asarray(rng.standard_normal((1, n, 1, dim), np.float32), jnp.float32) for n in (n_queries, n_keys, n_keys))
visible = Visible(jnp.zeros((1, n_queries), jnp.int32), jnp.full((1, n_queries), n_keys, jnp.int32))


def error_of(topk):
    """A function of the queries: (effective number of keys, error of the output relative to dense attention)."""

    def measure(q):
        everything = dense_attention(q, k, v, visible, softmax_scale=dim**-0.5)
        chosen = attention_topk(q, k, everything.lse, visible, softmax_scale=dim**-0.5, topk=topk)
        kept = sparse_attention(q, k, v, chosen, softmax_scale=dim**-0.5)
        probability = jax.nn.softmax(dim**-0.5 * jnp.einsum("bthd,bshd->bhts", q, k), axis=-1)
        spread = jnp.exp(jax.scipy.special.entr(probability).sum(-1)).mean()
        return spread, jnp.linalg.norm(kept.out - everything.out) / jnp.linalg.norm(everything.out)

    return jax.jit(measure)


figure, panel = plt.subplots(figsize=(7, 3.8), layout="constrained")
figure.suptitle("From which breadth of attention on must a selection fail?")
for topk in (8,) if SMALL else (8, 32, 128):
    measure = error_of(topk)
    spread, error = np.array([measure(sharpness * q) for sharpness in np.geomspace(0.1, 20, 12)]).T
    panel.plot(spread, error, "o-", markersize=4, label=f"best {topk} keys")
panel.set(
    xscale="log",
    xlabel=f"keys that attention is spread over, exp(entropy), of {n_keys}",
    ylabel="error of the output over its norm",
)
panel.set_xticks([1, 4, 16, 64, 256], ["1", "4", "16", "64", "256"])
panel.grid(alpha=0.3)
panel.legend(frameon=False)
