"""The trainer checkpoints of a round in, the newest that training can resume from out."""

from __future__ import annotations

import json
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from align.log import log


def last_checkpoint(folder: Path, num_processes: int) -> Path | None:
    """The newest trainer checkpoint that was written to its end."""
    checkpoints = sorted(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=lambda path: int(path.name.split("-")[-1]))
    for path in reversed(checkpoints):
        if _is_complete(path, num_processes):
            return path
        log.warning("%s was not written to its end and is not used", path)
    return None


def _is_complete(path: Path, num_processes: int) -> bool:
    # The Trainer writes trainer_state.json last; each process writes its own random state.
    try:
        json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    return num_processes == 1 or all((path / f"rng_state_{rank}.pth").is_file() for rank in range(num_processes))
