"""Training in two processes: configurations of one folder, and one launch for many of them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import yaml

from align.config import Config, load_config
from align.distributed.launch import launch_command
from align.loop import run_stage
from tests.patience import PATIENCE_S

ROOT = Path(__file__).parents[2]
TRAINING = {
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 1,
    "gradient_checkpointing": False,
}


def add_run(folder: Path, name: str, *, dpo: dict[str, Any] | None = None, **fields: Any) -> Config:
    """A run of one round in folder/runs/NAME, configured in folder/NAME.yaml, whose pairs have been read."""
    data = {"name": name, "rounds": 1, "image_root": "images", "dpo": TRAINING | (dpo or {})}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(data | fields))
    config = load_config(path)
    run_stage(config, "pairs", 1)
    return config


def train_in_two_processes(folder: Path, names: list[str], timeout: float = PATIENCE_S) -> None:
    """Train the named runs, one after the other, in one launch of two processes."""
    config = load_config(folder / f"{names[0]}.yaml", ["launch.num_processes=2"])
    command = launch_command(config.launch, [str(folder / f"{name}.yaml") for name in names])
    command[command.index("align.cli")] = "tests.distributed.worker"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def run_alone(config: Config) -> None:
    """Train a run in this process."""
    run_stage(config, "dpo", 1)
