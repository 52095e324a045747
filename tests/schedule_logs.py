"""Logs as Lightning's loggers write them, of a run that obeys a known law."""

import math
import random

from rewarm.schedules.logs import warmup_of
from rewarm.schedules.loss_laws import AnnealingLaw

LAW = AnnealingLaw(2.6, 0.43, 0.55, 20.0, decay=0.99)
STEPS = 400


def write_log(path, schedule, noise=0.0, seed=0, total=STEPS, every=10, loss="train/loss"):
    """A log as CSVLogger writes it: training steps from 0, gaps where something else is logged."""
    rng = random.Random(seed)
    lrs = [1e-3 * schedule(n, total) for n in range(1, total + 1)]
    losses = LAW(lrs, warmup_of(lrs)).tolist()
    lines = [f"epoch,lr,step,{loss}"]
    for step in range(every, total + 1, every):
        lines.append(f"0,{lrs[step - 1]!r},{step - 1},")
        shift = 0 if loss.startswith("val/") else 1
        lines.append(f"0,,{step - shift},{losses[step - 1] * math.exp(rng.gauss(0, noise))!r}")
    path.write_text("\n".join(lines) + "\n")
    return str(path)
