"""Training in two processes: configurations of one folder, and one launch for many of them."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import yaml

from align.config import Config, load_config
from align.loop import run_stage
from tests.forks import in_two_processes

ROOT = Path(__file__).parents[2]
TRAINING = {
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 1,
    "gradient_checkpointing": False,
}


def add_run(folder: Path, name: str, *, dpo: dict[str, Any] | None = None, **fields: Any) -> Config:
    """A run of one round in folder/runs/NAME, configured in folder/NAME.yaml, whose pairs have been read.

    What is None in `dpo` is not set.
    """
    training = {key: value for key, value in (TRAINING | (dpo or {})).items() if value is not None}
    data = {"name": name, "rounds": 1, "image_root": "images", "dpo": training}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(data | fields))
    config = load_config(path)
    run_stage(config, "pairs", 1)
    return config


def train_in_two_processes(folder: Path, names: list[str]) -> None:
    """Train round 1 of the named runs, one after the other, in one launch of two processes."""
    in_two_processes(_train, [folder / f"{name}.yaml" for name in names], TORCH_EXTENSIONS_DIR=str(folder / "compiled"))


def _train(paths: list[Path]) -> None:
    for path in paths:
        run_stage(load_config(path), "dpo", 1)
        gc.collect()


def run_alone(config: Config) -> None:
    """Train a run in this process."""
    run_stage(config, "dpo", 1)
