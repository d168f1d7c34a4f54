"""The smallest project whose run goes through every stage: three questions, two responses, a critic without a model."""

from __future__ import annotations

import json
from pathlib import Path

from tests.stage_runs import make_project


def make_damage_project(folder: Path) -> Path:
    """Write it into a folder of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    make_project(
        folder,
        rounds=1,
        sample={"num_responses": 2, "max_new_tokens": 4, "temperature": 1.0, "top_p": 1.0, "batch_size": 4},
        evaluate={"questions": "eval.jsonl", "max_new_tokens": 3, "num_samples": 1, "limit": 1},
        dpo={
            "learning_rate": 1e-3,
            "warmup_steps": 0,
            "per_device_train_batch_size": 1,
            "gradient_checkpointing": False,
            "num_train_epochs": 1,
            "save_steps": 1,
            "logging_steps": 1,
        },
    )
    lines = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()][:3]
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
