# %% [markdown]
# # What sparse attention costs and saves
#
# All numbers here are computed, none is measured. `dsa_jax.costs.model` counts floating-point operations and assumes sustained
# speeds, which are fitted to the published curves of DeepSeek-V3.2-Exp on H800s at 2 dollars an hour. `python -m
# experiments.costs` prints the same; with `--benchmark=FILE` it draws the curves of attention from measured kernels
# instead.

# %%
import matplotlib.pyplot as plt
import numpy as np

from configs import deepseek_v2_lite, deepseek_v32, glm5, llama3_8b, qwen3_0_6b
from dsa_jax.costs.model import ATTENTIONS, H800_REPORT, PHASES, cache_bytes_per_token, dollars_per_million_tokens
from dsa_jax.costs.report import CACHE_DTYPES, PUBLISHED_DOLLARS, PUBLISHED_POSITIONS, cost_tables, draw_costs, format_costs

LENGTH = 131072
config = deepseek_v32.get_config()
tables = cost_tables(config.model, H800_REPORT, LENGTH)

# %% [markdown]
# ## The two curves of the report
#
# Lines are the model of costs, crosses the report's figure 3. They agree because the speeds were fitted to them; what the
# fit shows is that a few plausible speeds explain all four curves.

# %%
figure, panels = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
figure.suptitle("What does a million tokens cost at each position, DeepSeek-V3.2 on H800?")
for panel, phase in zip(panels, PHASES, strict=True):
    draw_costs(panel, tables, phase)
    for attention in ATTENTIONS:
        published = PUBLISHED_DOLLARS[phase, attention]
        label = "published" if attention == ATTENTIONS[0] else None
        panel.plot(np.divide(PUBLISHED_POSITIONS, 1024), published, "x", color="black", label=label)
    panel.set_title(phase)
    panel.legend(frameon=False)

# %%
print(format_costs(tables))

# %% [markdown]
# ## From where does it pay?
#
# Sparse attention is overhead while the context is about as long as the selection: the indexer scores every key either
# way. Above 1 it pays. For training the ratio is of operations, averaged over a sequence of that length, not of dollars.

# %%
positions = np.array(tables["positions"])
figure, panel = plt.subplots(figsize=(7.5, 4), layout="constrained")
figure.suptitle("From which context length does sparse attention pay?")
for phase in PHASES:
    curves = tables["dollars_per_million_tokens"][phase]
    ratio = np.divide(curves["dense"], curves["sparse"])
    (line,) = panel.plot(positions[1:] / 1024, ratio[1:], label=f"{phase}, dollars")
    start = tables["pays_from"][phase]
    panel.plot(
        start / 1024, np.interp(start, positions, ratio), "o", color=line.get_color(), label=f"pays from {start:,} tokens"
    )
training = tables["training_flops_per_token"]
panel.plot(positions[1:] / 1024, np.divide(training["dense"], training["sparse"]), label="training, operations")
panel.axhline(1, color="black", linewidth=1, linestyle="--")
panel.set_xscale("log", base=2)
panel.set_xticks([1, 4, 16, 64, 128], ["1", "4", "16", "64", "128"])
panel.set(xlabel="position or sequence length, K tokens", ylabel="dense over sparse, times cheaper")
panel.grid(alpha=0.3)
panel.legend(frameon=False, fontsize=8)

# %% [markdown]
# ## What it costs in memory
#
# Sparse attention saves work, not memory: all keys stay in the cache, and the index keys come on top.

# %%
MODELS = {
    "DeepSeek-V3.2": config.model,
    "GLM-5": glm5.get_config().model,
    "DeepSeek-V2-Lite": deepseek_v2_lite.get_config().model,
    "Llama 3 8B": llama3_8b.get_config().model,
    "Qwen3 0.6B": qwen3_0_6b.get_config().model,
}
figure, panels = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained", sharey=True)
figure.suptitle("How much cache does a token take, and how much of it is the index?")
for panel, dtype in zip(panels, CACHE_DTYPES, strict=True):
    sizes = np.array([[cache_bytes_per_token(model, dtype, a) / 1024 for a in ATTENTIONS] for model in MODELS.values()])
    panel.barh(list(MODELS), sizes[:, 0], label="keys and values")
    panel.barh(list(MODELS), sizes[:, 1] - sizes[:, 0], left=sizes[:, 0], label="index keys")
    for place, (dense, sparse) in enumerate(sizes):
        panel.annotate(f" +{sparse / dense - 1:.0%}", (sparse, place), va="center", fontsize=8)
    panel.set(title=dtype, xlabel="cache, KiB per token", ylabel="model", xlim=(0, 1.15 * sizes.max()))
panels[0].invert_yaxis()
panels[0].legend(frameon=False)

# %% [markdown]
# ## Other models
#
# The same speeds with other geometries. Expect less of these curves than of the first: the speeds were fitted to one
# model, and a small model on one GPU does not reach them. What carries over is the shape: far out, the saving levels off
# at the work of attention per key over the work of an index score. Models whose heads are many or wide beside those of
# their indexer have the most to save.

# %%
figure, panels = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
figure.suptitle("Which models gain, and from which length on?")
for name, model in MODELS.items():
    for panel, phase in zip(panels, PHASES, strict=True):
        dense, sparse = (
            dollars_per_million_tokens(model, positions[::4].tolist(), phase=phase, attention=attention, rates=H800_REPORT)
            for attention in ATTENTIONS
        )
        panel.plot(positions[::4] / 1024, np.divide(dense, sparse), label=f"{name}, topk {model.attention.indexer.topk}")
for panel, phase in zip(panels, PHASES, strict=True):
    panel.axhline(1, color="black", linewidth=1, linestyle="--")
    panel.set(title=phase, xlabel="token position, K", ylabel="dense over sparse dollars, times cheaper", ylim=(0, None))
    panel.grid(alpha=0.3)
panels[0].legend(frameon=False, fontsize=8)
