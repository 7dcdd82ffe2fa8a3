"""The quickstart over three seeds, with mean and spread.

Command:   python -m experiments.retrofit --config=configs/recall_seeds.py --workdir=runs/recall_seeds
Hardware:  two CPU cores, three times as long as the quickstart.
Result:    experiments/results/recall_seeds.md
"""

from configs import quickstart
from dsa_jax.config import Config


def get_config(arg: str = "") -> Config:
    config = quickstart.get_config(arg)
    config.name = "recall_seeds"
    config.seeds = (0, 1, 2)
    return config
