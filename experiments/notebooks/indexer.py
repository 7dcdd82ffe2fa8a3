# %% [markdown]
# # What does the lightning indexer select?
#
# Every attention layer has a small indexer. It scores all keys that a query may see, and attention reads only the `topk`
# keys of the highest score. The indexer is trained in a warm-up to imitate the attention that is already there.
#
# The model here is small and the task is recall: records (a key with its value) lie among filler tokens, and the last
# quarter of a row asks for keys. A query must find the one record that answers it. With 8 of 64 keys, that takes a
# choice.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from dsa_jax.evals.attention_maps import attention_maps
from experiments.notebooks.small_model import data_of, recipe, trained

config = recipe()
topk = config.model.attention.indexer.topk
model, params = trained(config)
_, held_out = data_of(config)
batch = next(held_out.recall_batches(16, config.eval.recall_len, 16))
maps_of = jax.jit(lambda p: attention_maps(model, p, jnp.asarray(batch.input_ids)))
before, after, trained_sparse = (jax.device_get(maps_of(params[stage])) for stage in ("pretrain", "warmup", "sparse"))

# %% [markdown]
# ## Scores beside attention
#
# Left: the probability that attention gives to each key, mean over its heads. Middle and right: the softmax of the index
# scores over the visible keys, before and after the warm-up. The warm-up makes the right one like the left one; that is
# all its loss asks. The indexer shares no weights with attention.

# %%
figure, panels = plt.subplots(config.model.n_layers, 3, figsize=(11, 3.5 * config.model.n_layers), layout="constrained")
figure.suptitle("Do the index scores look like the attention they imitate?")
for layer, row in enumerate(panels):
    shown = {
        "attention": after[layer].attention[0],
        "scores before warm-up": jax.nn.softmax(before[layer].scores[0], axis=-1),
        "scores after warm-up": jax.nn.softmax(after[layer].scores[0], axis=-1),
    }
    for panel, (name, share) in zip(row, shown.items(), strict=True):
        visible = np.tril(np.ones(share.shape, dtype=bool))
        # Square roots, or the many small shares would all look like zero.
        image = panel.imshow(np.sqrt(np.where(visible, share, np.nan)), vmin=0, vmax=0.7, interpolation="nearest")
        panel.set(title=f"layer {layer}: {name}", xlabel="key, position in tokens", ylabel="query, position in tokens")
    figure.colorbar(image, ax=row, label="square root of the share of a key", extend="max")

# %% [markdown]
# ## Which keys are selected
#
# The layer that looks answers up (the one with most attention on them), and the queries of the last quarter, each a line:
# grey are the selected keys, orange rings the record that is asked for. A ring without a grey dot inside is an answer
# that this layer cannot read. The layers share the work: a record that one misses another may read. The shares below are
# over the whole batch. Sparse training goes on from there: attention and indexer then learn together.

# %%
task = held_out.recall
ids, length = np.asarray(batch.input_ids), config.eval.recall_len
questions = np.arange(length - length // 4, length)


def selection(scores):
    """Mask of the topk best visible keys; equal scores go to the lower position, as in the model."""
    chosen = np.argsort(-scores, axis=-1, kind="stable")[..., :topk]
    mask = np.zeros(scores.shape, bool)
    np.put_along_axis(mask, chosen, True, axis=-1)
    return mask & np.isfinite(scores)


def asked_records(ids):
    """Position of the record that each question asks for, [rows, questions]."""
    keys = ids[:, questions] - task.first_key
    record = (ids >= task.first_record) & (ids < task.first_record + task.n_keys * task.n_values)
    held = np.where(record, (ids - task.first_record) // task.n_values, -1)
    return (held[:, None, :] == keys[:, :, None]).argmax(-1)


asked = asked_records(ids)
figure, panels = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained", sharey=True)
figure.suptitle("Is the record that a query asks for among its selected keys?")
asks = lambda one: np.take_along_axis(one.attention[:, questions], asked[..., None], axis=-1).mean()
lookup = int(np.argmax([asks(one) for one in before]))
for panel, (name, maps) in zip(panels, {"before warm-up": before, "after warm-up": after}.items(), strict=True):
    mask = selection(maps[lookup].scores)[0, questions]
    query, key = np.nonzero(mask)
    panel.scatter(key, questions[query], s=14, color="0.6", label="selected")
    panel.scatter(asked[0], questions, s=60, facecolors="none", edgecolors="tab:orange", linewidths=1.6, label="asked for")
    panel.set(title=f"layer {lookup}, {name}", xlabel="key, position in tokens", ylabel="query, position in tokens")
    panel.invert_yaxis()
figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)


def found(mask):
    """Mask of the questions whose record is selected, [rows, questions]."""
    return np.take_along_axis(mask[:, questions], asked[..., None], axis=-1)[..., 0]


window = np.tril(np.ones((length, length), bool)) & ~np.tril(np.ones((length, length), bool), -topk)
print("share of questions whose record is selected")
for name, maps in {"before": before, "after warm-up": after, "after sparse training": trained_sparse}.items():
    hits = [found(selection(one.scores)) for one in maps]
    shares = ", ".join(f"layer {layer} {hit.mean():.2f}" for layer, hit in enumerate(hits))
    print(f"  {name}: {shares}, in either {np.any(hits, axis=0).mean():.2f}")
print(f"  the last {topk} keys instead: {found(np.broadcast_to(window, (len(ids), length, length))).mean():.2f}")

# %% [markdown]
# ## Ties at zero
#
# A score is a weighted sum of ReLUs. Where no head responds, it is exactly 0, and such keys tie. Equal scores go to the
# lower position, so that the same inputs select the same keys on every device. The plateau below is those ties; it
# matters only where the dashed line, the last selected key, falls on it.

# %%
figure, panels = plt.subplots(1, config.model.n_layers, figsize=(11, 3.2), layout="constrained", squeeze=False)
figure.suptitle("How many keys tie at a score of zero?")
for layer, panel in enumerate(panels[0]):
    for name, maps, colour in (("before warm-up", before, "0.5"), ("after warm-up", after, "tab:blue")):
        scores = maps[layer].scores[:, -1]
        ties = (scores == 0).mean()
        panel.plot(np.arange(1, length + 1), -np.sort(-scores[0]), color=colour, label=f"{name}: {ties:.0%} are exactly 0")
    panel.axvline(topk + 0.5, color="black", linestyle="--", linewidth=1, label=f"selected: {topk}")
    panel.set(title=f"layer {layer}, last query", xlabel="rank of the key", ylabel="index score")
    panel.legend(frameon=False)

# %% [markdown]
# ## How close is the call?
#
# The margin is the distance from the last selected score to the first one that is not, here as a share of the spread of
# the row's scores. Rounding moves a score by roughly its precision, so queries left of a dotted line may select another
# key in that precision. The keys beside the cut usually hold little attention; `parity.ipynb` measures what such a change
# does.


# %%
def margins(scores):
    """Margin at the cut over the standard deviation of the row, for the queries that have something to leave out."""
    rows = [np.sort(row[np.isfinite(row)])[::-1] for row in scores.reshape(-1, length)]
    rows = [row for row in rows if len(row) > topk]
    return np.array([(row[topk - 1] - row[topk]) / max(row.std(), 1e-30) for row in rows])


figure, panel = plt.subplots(figsize=(7.5, 3.8), layout="constrained")
figure.suptitle("How close to the next score is the last one selected?")
for layer, color in zip(range(config.model.n_layers), ("tab:blue", "tab:green"), strict=False):
    for name, maps, style in (("before warm-up", before, ":"), ("after warm-up", after, "-")):
        values = np.sort(margins(maps[layer].scores))
        share = np.arange(1, len(values) + 1) / len(values)
        panel.plot(np.maximum(values, 1e-6), share, color=color, linestyle=style, label=f"layer {layer}, {name}")
for name, precision in (("bfloat16", 2.0**-9), ("e4m3", 2.0**-4)):
    panel.axvline(precision, color="black", linestyle="dotted", linewidth=1)
    panel.annotate(name, (precision, 0.02), rotation=90, ha="right", fontsize=8)
panel.set(xscale="log", xlabel="margin, in standard deviations of the row's scores", ylabel="share of queries with less")
panel.grid(alpha=0.3)
panel.legend(frameon=False, fontsize=8)
