"""Training that ran out of memory is tried again with less at a time: half as many pairs, twice as many times per step.

Where it was left to the memory model how many layers are recomputed (`align.dpo.recomputation`), all are, before that.

The pairs of a step and their number stay the same, and the training curve with them. What was found is kept in
the round's trainer folder (``batch.json``), so that a run which resumes does not try again what cannot work.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from align.config import Config, DpoSettings
from align.dpo.settings import AUTO, checkpointing_field
from align.errors import UserError
from align.files import make_folder, write_text
from align.log import log

SMALLER_ROWS = (
    "set dpo.gradient_checkpointing=true, shard the model (--strategy zero3), train an adapter (dpo.lora), "
    "freeze parts (dpo.freeze), or let images have fewer tokens (model.processor)"
)
FIELDS = ("per_device_train_batch_size", "gradient_accumulation_steps")


def with_batch_that_fits(config: Config, trainer_folder: Path) -> Config:
    """The configuration with the batch that earlier attempts at this round have come down to, if any."""
    path = _path(trainer_folder)
    if not path.is_file():
        return config
    found = json.loads(path.read_text(encoding="utf-8"))
    smaller = config.model_copy()
    smaller.dpo = DpoSettings.model_validate(config.dpo.model_dump() | found)
    return smaller


def remember_smaller_batch(trainer_folder: Path, fields: dict[str, Any], tokens_per_batch: int | None = None) -> None:
    """Note half of the batch that did not fit; with an odd one a micro-batch is a single row.

    Raises:
        UserError: it was a single row already, or what fits was said in tokens.
    """
    before, accumulated = (int(fields[name]) for name in FIELDS)
    if fields[checkpointing_field()] == AUTO:
        log.warning("out of memory: starting again with every layer recomputed (dpo.gradient_checkpointing)")
        _note(trainer_folder, before, accumulated, checkpointing=True)
        return
    if tokens_per_batch is not None:
        raise UserError(
            f"out of memory with dpo.tokens_per_batch: {tokens_per_batch}; the largest batches come first, so that "
            "what fits in the first two steps fits to the end",
            fix=f"lower it, down to the longest row; with that {SMALLER_ROWS}",
        )
    if before == 1:
        raise UserError("out of memory with a single row at a time", fix=SMALLER_ROWS)
    now = before // 2 if before % 2 == 0 else 1
    steps = accumulated * (before // now)
    _note(trainer_folder, now, steps, checkpointing=bool(fields[checkpointing_field()]))
    log.warning("out of memory with %d rows at a time: continuing with %d, and %d times per step", before, now, steps)


def _note(trainer_folder: Path, batch: int, accumulated: int, *, checkpointing: bool) -> None:
    make_folder(trainer_folder)
    found = {**dict(zip(FIELDS, (batch, accumulated), strict=True)), "gradient_checkpointing": checkpointing}
    write_text(_path(trainer_folder), json.dumps(found))


def note_on_batch(trainer_folder: Path) -> dict[str, str]:
    """What the manifest should say about it."""
    path = _path(trainer_folder)
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    every = ", every layer recomputed" if found.get("gradient_checkpointing") else ""
    return {"batch": f"memory ran out: {found[FIELDS[0]]} rows at a time, {found[FIELDS[1]]} times per step{every}"}


def _path(trainer_folder: Path) -> Path:
    return trainer_folder / "batch.json"
