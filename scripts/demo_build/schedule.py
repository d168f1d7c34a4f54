"""Learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable


def cosine_with_warmup(num_steps: int, num_warmup: int, floor: float = 0.02) -> Callable[[int], float]:
    """Factor of the peak rate at a step: linear up, then half a cosine down to `floor`."""

    def factor(step: int) -> float:
        if step < num_warmup:
            return (step + 1) / num_warmup
        done = (step - num_warmup) / max(1, num_steps - num_warmup)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return factor
