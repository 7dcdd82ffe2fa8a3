# %% [markdown]
# # A retrofit, step by step
#
# A model with dense attention gets sparse attention in three stages: dense training (or a checkpoint that has it behind
# it), a warm-up in which only the indexer learns, and sparse training. `experiments.retrofit` does this from a recipe.
# Here each stage runs by itself, on the same library functions.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np

from dsa_jax import build_model, init_params
from dsa_jax.evals.parity import evaluate_parity
from dsa_jax.params import count_parameters, is_indexer_path, split_parameters
from dsa_jax.report.report import format_table
from experiments.notebooks.small_model import data_of, recipe, train_stage

config = recipe()
model = build_model(config.model)
params = {"init": init_params(model, jax.random.key(config.seed))}
train_data, held_out = data_of(config)
indexer, _ = split_parameters(params["init"], is_indexer_path)
print(f"{count_parameters(params['init']):,} parameters, {count_parameters(indexer):,} of them in indexers")


def smooth(values, width=10):
    """Mean over the last `width` steps."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    last = np.arange(1, len(values) + 1)
    first = np.maximum(last - width, 0)
    return (sums[last] - sums[first]) / (last - first)


def draw(panel, values, label, color="tab:blue"):
    """A quantity by step, and its mean over ten steps."""
    panel.plot(values, color=color, alpha=0.25)
    panel.plot(smooth(values), color=color)
    panel.set(xlabel="step", ylabel=label)
    panel.grid(alpha=0.3)


# %% [markdown]
# ## 1. Dense
#
# The model learns recall with attention to every visible key. The indexer is there, but nothing uses it and nothing
# trains it. Accuracy stays at guessing while the model learns which values there are, then rises as it learns where to
# look.

# %%
params["pretrain"], dense = train_stage(config, "pretrain", model, params["init"], train_data)
figure, panels = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
figure.suptitle("Does the dense model learn to look things up?")
draw(panels[0], dense["loss"], "loss, nats per answer")
draw(panels[1], dense["accuracy"], "share of answers right")
guess = 1 / config.data.recall.n_values
panels[1].axhline(guess, color="black", linestyle="--", linewidth=1, label=f"guessing: {guess:.2f}")
panels[1].legend(frameon=False)

# %% [markdown]
# ## 2. Warm-up
#
# All else is frozen. The indexer learns to give each visible key the probability that attention gives it, summed over
# heads. The measure is the divergence KL(attention || softmax of the scores), summed over layers here.

# %%
params["warmup"], warmup = train_stage(config, "warmup", model, params["pretrain"], train_data)
figure, panel = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
figure.suptitle("How fast does the indexer learn where attention looks?")
draw(panel, warmup["kl"], "KL over visible keys, nats")
panel.set_yscale("log")

_, kept_before = split_parameters(params["pretrain"], is_indexer_path)
_, kept_after = split_parameters(params["warmup"], is_indexer_path)
same = jax.tree.map(lambda a, b: bool((a == b).all()), kept_before, kept_after)
print("everything but the indexer is unchanged:", all(jax.tree.leaves(same)))

# %% [markdown]
# ## 3. Sparse
#
# Attention now reads only the selected keys. The model goes on learning from its own loss, the indexer from the
# divergence over the selected keys. Neither gradient reaches the other's weights.

# %%
params["sparse"], sparse = train_stage(config, "sparse", model, params["warmup"], train_data)
figure, panels = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
figure.suptitle("Does the model notice that attention has become sparse?")
draw(panels[0], sparse["loss"], "loss, nats per answer")
last = np.mean(dense["loss"][-50:])
panels[0].axhline(last, color="tab:orange", linestyle="--", label=f"dense, last 50 steps: {last:.3f}")
panels[0].legend(frameon=False)
draw(panels[1], sparse["kl"], "KL over selected keys, nats", "tab:green")

# %% [markdown]
# ## 4. The table
#
# The same weights on held-out rows, reading different keys; the first row is the dense model as it was before stage 3. A
# good indexer has `sparse` close to `dense` and to the oracle, far above an untrained indexer and a window of the same
# size.

# %%
table = evaluate_parity(model, params["sparse"], held_out, config, params_before=params["pretrain"])
print(format_table(table.rows))

figure, panels = plt.subplots(1, 2, figsize=(10, 3.0), layout="constrained", sharey=True)
figure.suptitle(f"What does reading {config.model.attention.indexer.topk} of {config.eval.recall_len} keys cost?")
names = [row["name"] for row in table.rows]
for panel, column, label in (
    (panels[0], "recall_accuracy", "share of held-out answers right"),
    (panels[1], "coverage", "share of attention mass that is read"),
):
    values = [row[column] for row in table.rows]
    panel.barh(names, values, color="tab:blue")
    for place, value in enumerate(values):
        panel.annotate(f"{value:.3f}", (value, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8)
    panel.set(xlabel=label, ylabel="what attention reads", xlim=(0, 1.15))
panels[0].invert_yaxis()
