"""`experiments.retrofit` in a process that sends itself a signal: `process_main.py WHEN SIGNAL FLAGS...`.

WHEN is never, STAGE:STEP (as the metrics of that step are read) or seal:STEP (as that checkpoint has all but its manifest).
"""

import os
import signal
import sys

from dsa_jax.run.checkpoints import CheckpointStore
from dsa_jax.train.judge import Judge
from experiments import retrofit
from experiments.flags import run_main


def arm(when, number):
    take, seal = Judge.take, CheckpointStore._seal

    def take_and_signal(self, step, values):
        if when == f"{self.stage.name}:{step}":
            os.kill(os.getpid(), number)
        return take(self, step, values)

    def signal_and_seal(self):
        if self._pending is not None and when == f"seal:{self._pending[0]}":
            os.kill(os.getpid(), number)
        return seal(self)

    Judge.take, CheckpointStore._seal = take_and_signal, signal_and_seal


if __name__ == "__main__":
    arm(sys.argv[1], signal.Signals[sys.argv[2]])
    run_main(retrofit.main, ["experiments.retrofit", *sys.argv[3:]])
