"""Trains round 1 of several configurations, one after the other, in every process of a launch:
starting is what takes long."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

from align.config import load_config
from align.loop import run_stage

if __name__ == "__main__":
    for path in sys.argv[1:]:
        run_stage(load_config(Path(path)), "dpo", 1)
        gc.collect()
