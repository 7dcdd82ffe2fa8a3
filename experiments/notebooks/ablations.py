# %% [markdown]
# # What the sweeps found
#
# `python -m experiments.ablate --config=configs/ablations/NAME.py` trains the same small model with one thing changed at
# a time, over several seeds, and keeps the results as JSON. This notebook reads those files; it trains nothing. Points
# are seeds, lines and ticks their mean, the orange line is dense attention before the retrofit.

# %%
import importlib
import json
import pkgutil

import matplotlib.pyplot as plt
import numpy as np

import configs.ablations
from dsa_jax.config.selections import BEFORE
from dsa_jax.sweeps.plot import draw_ablation, figure_size
from dsa_jax.sweeps.summary import answers, environments, format_table, total_seconds
from experiments.notebooks.settings import RESULTS

sweeps = {
    module.name: importlib.import_module(f"configs.ablations.{module.name}").get_config()
    for module in pkgutil.iter_modules(configs.ablations.__path__)
}
plt.rcParams["figure.dpi"] = 72  # one figure per sweep, all of them in this file
results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}

# %% [markdown]
# ## Which sweeps are there?
#
# A sweep without a bar has not been run, or its file is not here.

# %%
names = sorted({*sweeps, *results})
planned = [len(sweeps[n].variants) * len(sweeps[n].seeds) if n in sweeps else 0 for n in names]
finished = [sum("rows" in run for run in results[n]["runs"]) if n in results else 0 for n in names]
figure, panel = plt.subplots(figsize=(8, 1.2 + 0.26 * len(names)), layout="constrained")
figure.suptitle("Which sweeps have been run?")
panel.barh(names, planned, color="0.9", label="in the recipe")
panel.barh(names, finished, height=0.5, color="tab:blue", label="finished")
panel.set(xlabel="runs: variants times seeds", ylabel="sweep, configs/ablations/NAME.py")
panel.invert_yaxis()
panel.legend(frameon=False)
missing = [name for name in names if name not in results]
partly = [name for name, done, all_ in zip(names, finished, planned, strict=True) if 0 < done < all_]
print("missing:", ", ".join(missing) or "none")
print("finished in part:", ", ".join(partly) or "none")
for text in dict.fromkeys(text for result in results.values() for text in environments(result)):
    print("device:", text)

# %% [markdown]
# ## Which choice matters?
#
# Every variant of every sweep by the recall accuracy that it keeps, as the difference from dense attention before the
# retrofit in the same sweep. A sweep whose points lie together is about a choice that matters little for this task.


# %%
def kept(result, quantity="recall accuracy"):
    """Mean accuracy of each variant minus that of dense attention, by name; empty where either is missing."""
    lines = {line.name: line.quantities[quantity].mean for line in answers(result) if quantity in line.quantities}
    dense = lines.pop(BEFORE.title, None)
    return {} if dense is None else {name: value - dense for name, value in lines.items()}


differences = {name: values for name, result in results.items() if (values := kept(result))}
if differences:
    figure, panel = plt.subplots(figsize=(8, 1.2 + 0.3 * len(differences)), layout="constrained")
    figure.suptitle("Which choice decides whether recall survives?")
    for place, values in enumerate(differences.values()):
        panel.plot(list(values.values()), [place] * len(values), "o", color="tab:blue", alpha=0.6)
        worst = min(values, key=values.get)
        panel.annotate(worst, (values[worst], place), xytext=(0, 5), textcoords="offset points", fontsize=7)
    panel.axvline(0, color="tab:orange", linestyle="--", label=BEFORE.title)
    panel.set_yticks(np.arange(len(differences)), list(differences))
    panel.set(xlabel="recall accuracy minus that of dense attention; the worst variant is named", ylabel="sweep")
    panel.invert_yaxis()
    panel.legend(frameon=False, fontsize=8)

# %% [markdown]
# ## Sweep by sweep
#
# The question is the title. The table behind each figure is in the file of the same name beside the results, with the
# command.

# %%
for result in results.values():
    figure = plt.figure(figsize=figure_size(result), layout="constrained")
    draw_ablation(figure, result)
    plt.show()
    print("\n".join(format_table(result)))
    seeds = ", ".join(map(str, result["seeds"]))
    print(f"\nseeds {seeds}; {len(result['runs'])} runs, {total_seconds(result) / 60:.0f} minutes\n{result['command']}\n")
