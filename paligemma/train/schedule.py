"""How the learning rate rises and falls during a run: linear warm-up from 0, then decay to 0 (or none).

    rate
     1 |    ______            cosine
       |   /      \\__
       |  /          \\__
     0 |_/______________\\___ progress: the share of the run that is done
       0  warmup             1

A schedule is a function of progress, not of the step: a run may be limited by minutes as well as by steps.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paligemma.train.loop import TrainConfig

SCHEDULES = ("cosine", "linear", "constant")


def learning_rate_factor(progress: float, config: TrainConfig) -> float:
    """What the peak learning rates are multiplied by at `progress` in [0, 1].

    A warm-up that is shorter than one step is left out: all it could do is keep that step, which may be the only one,
    from learning anything.
    """
    warmup = config.warmup if config.warmup * config.steps >= 1 else 0.0
    if progress < warmup:
        return progress / warmup
    start = max(warmup, config.decay_from)
    decayed = min(1.0, max(0.0, (progress - start) / max(1e-9, 1 - start)))
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * decayed))
    return 1 - decayed if config.schedule == "linear" else 1.0
