"""Steps of 5e-7 in three ways: float32 weights, bfloat16 ones rounded at random under 8-bit AdamW, plain bfloat16 ones.

    OMP_NUM_THREADS=1 python scripts/bench_low_bit.py            needs torchao (`.[low-bit]`)

DPO of a tiny model on a few pairs, all of them in every step, at a constant rate, from the same weights. What is
compared is the loss of the weights alone: computed in float32 whatever they were trained in, against the first ones.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from align.dpo.collator import PairCollator, pair_dataset
from align.dpo.optimizers import ROUNDING, ROUNDING_ARGUMENT
from align.dpo.trainer import PairTrainer
from align.media.images import ImageStore
from tests import tiny_models
from tests.dpo.conftest import compute, make_args, make_pairs, tokenized

BETA = 0.1
RATE = 5e-7
ROUNDED = {"optim": ROUNDING[0], "optim_args": f"{ROUNDING_ARGUMENT}=True"}
WAYS: dict[str, tuple[torch.dtype, dict[str, str]]] = {
    "float32, AdamW": (torch.float32, {"optim": "adamw_torch"}),
    "bfloat16 rounded at random, 8-bit AdamW": (torch.bfloat16, ROUNDED),
    "bfloat16, AdamW": (torch.bfloat16, {"optim": "adamw_torch"}),
}


class Curve(TrainerCallback):
    """The loss of the weights before the first step and after every so many."""

    def __init__(self, task: Task, every: int) -> None:
        self.task, self.every = task, every
        self.losses: list[float] = [task.loss(task.model)]

    def on_step_end(self, *unused: Any, state: Any = None, model: Any = None, **unused_too: Any) -> None:
        step = state or unused[1]
        if step.global_step % self.every == 0:
            self.losses.append(self.task.loss(model))


class Task:
    """A model with weights that bfloat16 can hold, pairs, and what the model says of them."""

    def __init__(self, folder: Path, num_pairs: int) -> None:
        self.folder = folder
        self.images = ImageStore(folder)
        self.pairs = make_pairs(folder, num_pairs)
        self.collator = PairCollator(tiny_models.llava_onevision_processor(), self.images, "shared")
        self.model = tiny_models.llava_onevision().to(torch.bfloat16).float()
        self.reference = self.sums(self.model)

    def sums(self, model: Any) -> list[tuple[float, float]]:
        """Log-probabilities of the chosen and the rejected response of every pair, in float32."""
        exact = copy.deepcopy(model).float().eval()
        exact.__dict__.pop("forward", None)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "reference.jsonl"
            return compute(path, self.pairs, self.collator, lambda: exact, batch_size=len(self.pairs)).columns()

    def loss(self, model: Any) -> float:
        margins = [c - r - (c0 - r0) for (c, r), (c0, r0) in zip(self.sums(model), self.reference, strict=True)]
        return float(-logsigmoid(BETA * Tensor(margins).double()).mean())

    def train(self, way: str, *, steps: int, every: int, seed: int) -> list[float]:
        """The curve of one training."""
        dtype, fields = WAYS[way]
        curve = Curve(self, every)
        args = make_args(
            self.folder / "trainer",
            beta=BETA,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            warmup_steps=0,
            max_steps=steps,
            per_device_train_batch_size=len(self.pairs),
            seed=seed,
            **fields,
        )
        trainer = PairTrainer(
            copy.deepcopy(self.model).to(dtype),
            args=args,
            train_dataset=pair_dataset(tokenized(self.pairs, self.collator.processor, self.images), self.reference),
            data_collator=self.collator,
            processor=self.collator.processor,
            callbacks=[curve],
        )
        trainer.train()
        return curve.losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=2, help="of the rounding; float32 is trained once")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    every = max(1, arguments.steps // 4)
    with tempfile.TemporaryDirectory() as name, torch.compiler.set_stance("force_eager"):
        task = Task(Path(name), arguments.pairs)
        print(f"| weights, optimiser | seed | {' | '.join(f'step {every * i}' for i in range(5))} |")
        print("|---|---|---|---|---|---|---|")
        for way in WAYS:
            for seed in range(arguments.seeds if "random" in way else 1):
                losses = task.train(way, steps=arguments.steps, every=every, seed=seed)
                print(f"| {way} | {seed} | {' | '.join(f'{loss:.6f}' for loss in losses)} |", flush=True)


if __name__ == "__main__":
    main()
