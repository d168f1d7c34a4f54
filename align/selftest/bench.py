"""The demo's tiny Valley-Eagle, made-up pictures, questions and pairs: what every check of a selftest works on."""

from __future__ import annotations

import json
import math
import random
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from align.config import Config, build_config
from align.demo.data import POLICY
from align.demo.questions import TASKS, make_task
from align.engines.base import SampleRequest
from align.engines.local import LocalEngine
from align.media.images import ImageStore
from align.models.load import load_model, load_processor
from align.records import Pair, Question, write_jsonl
from align.run.folder import RunDir
from reward.judge_model import BranchedPrompt

PICTURE_PX = 112
NUM_STEPS = 3


class Bench:
    """Material in `folder` for checks on `device`; `num_processes` train together, one pair per step and process."""

    def __init__(self, folder: Path, device: torch.device, num_processes: int) -> None:
        self.folder, self.device, self.num_processes = folder, device, num_processes
        (folder / "images").mkdir(parents=True, exist_ok=True)
        self.images = ImageStore(folder / "images")
        self.processor = load_processor(POLICY)
        asked = [self._ask(index) for index in range(NUM_STEPS * num_processes)]
        self.questions = [question for question, _ in asked]
        self.pairs = [
            Pair(
                id=question.id,
                images=question.images,
                prompt=question.messages(),
                chosen=[{"role": "assistant", "content": question.answer}],
                rejected=[{"role": "assistant", "content": other}],
            )
            for question, other in asked
        ]

    def _ask(self, index: int) -> tuple[Question, str]:
        """A question about a picture of squares, with an answer, and another one."""
        name, rng = f"{index}.png", random.Random(index)
        squares = np.random.default_rng(index).integers(0, 256, size=(7, 7, 3), dtype=np.uint8)
        Image.fromarray(squares).resize((PICTURE_PX, PICTURE_PX), Image.Resampling.NEAREST).save(
            self.images.root / name
        )
        digits = rng.sample(range(10), 4)
        task, other = (make_task(rng, TASKS[index % len(TASKS)], part) for part in (digits[:2], digits[1:]))
        return Question(id=f"q{index}", question=task.question, images=[name], answer=task.answer), other.answer

    def model(self, dtype: torch.dtype = torch.float32) -> Any:
        """The policy on the device."""
        return load_model(POLICY, dtype=dtype, device=self.device).eval()

    @cached_property
    def policy(self) -> Any:
        """The policy in float32."""
        return self.model()

    def engine(self, shared_prefix: str) -> LocalEngine:
        """An engine of its own with the policy in float32."""
        return LocalEngine(self.model(), self.processor, open_image=self.images.open, shared_prefix=shared_prefix)

    def requests(self, num_samples: int) -> list[SampleRequest]:
        """All questions, each so many times."""
        return [
            SampleRequest(question.id, question.messages(), tuple(question.images), num_samples, seed)
            for seed, question in enumerate(self.questions)
        ]

    def comparisons(self) -> list[BranchedPrompt]:
        """Both orders of a pair's responses, behind its picture and question."""
        return [
            BranchedPrompt(
                tuple(pair.images),
                None,
                f"{question.question} ",
                ((pair.chosen[0]["content"], " or "), (pair.rejected[0]["content"], " or ")),
                "?",
                ("yes", "no"),
            )
            for question, pair in zip(self.questions, self.pairs, strict=True)
        ]

    def training(self, name: str, *, strategy: str = "ddp", **settings: Any) -> Config:
        """A run whose only round has the pairs; float32 arithmetic unless `dpo` says otherwise."""
        fields = {
            "name": name,
            "policy": str(POLICY),
            "pairs_file": "pairs.jsonl",
            "image_root": "images",
            "rounds": 1,
            "model": {"dtype": "float32", "device": self.device.type},
            "launch": {"strategy": strategy, "num_processes": 1},
            "dpo": {
                "freeze": ["vision"],
                "learning_rate": 1e-3,
                "lr_scheduler_type": "constant",
                "warmup_steps": 0,
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": 1,
                "gradient_checkpointing": False,
                "dataloader_num_workers": 0,
                "bf16": False,
                "report_to": "none",
                "save_strategy": "no",
            }
            | settings.pop("dpo", {}),
        }
        config = build_config(fields | settings, base=self.folder)
        pairs = RunDir(config.run_dir).round(1).pairs
        pairs.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(self.folder / "pairs.jsonl", self.pairs)
        write_jsonl(pairs, self.pairs)
        return config


def losses_of(config: Config) -> list[float]:
    """What a finished training logged at every step."""
    text = (RunDir(config.run_dir).round(1).checkpoint / "trainer_state.json").read_text(encoding="utf-8")
    return [float(entry["loss"]) for entry in json.loads(text)["log_history"] if "loss" in entry]


def largest_difference(one: list[float], other: list[float]) -> float:
    """Of equally long lists; infinite where they are not, or one has what is no number.

    >>> largest_difference([0.5, 0.25], [0.5, 0.5]), largest_difference([0.5], [])
    (0.25, inf)
    """
    if len(one) != len(other) or not all(map(math.isfinite, one + other)):
        return math.inf
    return max((abs(a - b) for a, b in zip(one, other, strict=True)), default=math.inf)
