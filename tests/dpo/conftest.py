"""Pairs about random images, and both trainers on them: TRL's own and ours."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from align.dpo.collator import PairCollator, pair_dataset
from align.dpo.reference import Reference, ReferenceKey, reference_log_probs
from align.dpo.tokenize import TokenizedPair, tokenize_pairs
from align.dpo.trainer import PairTrainer
from align.media.images import ImageStore
from align.records import Pair
from tests import tiny_models

WORDS = ["a cat", "two red squares", "nothing", "a dog on the left", "the digit 7", "a boat and a bird, both small"]


def make_pairs(folder: Path, count: int, num_images: tuple[int, ...] = (1,)) -> list[Pair]:
    """Pairs with different lengths and image sizes; the number of images cycles through `num_images`."""
    pairs = []
    for number in range(count):
        names = []
        for image in range(num_images[number % len(num_images)]):
            name = f"{number}-{image}.png"
            tiny_models.random_image(10 * number + image, width=24 + 9 * (number % 5), height=30).save(folder / name)
            names.append(name)
        question = {"type": "text", "text": "What is shown?" + " Look well." * (number % 3)}
        pairs.append(
            Pair(
                id=f"p{number}",
                images=names,
                prompt=[{"role": "user", "content": [{"type": "image"}] * len(names) + [question]}],
                chosen=[{"role": "assistant", "content": WORDS[number % 6]}],
                rejected=[{"role": "assistant", "content": WORDS[(number + 1 + number // 6) % 6] + "!" * (number % 2)}],
            )
        )
    return pairs


def tokenized(pairs: list[Pair], processor: Any, images: ImageStore) -> list[TokenizedPair]:
    """The pairs as training reads them; none is left out."""
    found = tokenize_pairs(pairs, processor, images)
    assert not found.dropped
    return found.pairs


def make_args(folder: Path, **fields: Any) -> DPOConfig:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "max_length": None,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "seed": 3,
        "disable_tqdm": True,
    }
    return DPOConfig(**(defaults | fields))


def trl_dataset(pairs: list[Pair], images: ImageStore) -> Dataset:
    """The same pairs as TRL wants them: images opened, beside prompt, chosen and rejected."""
    return Dataset.from_list(
        [
            {
                "images": [images.open(name) for name in pair.images],
                # As plain text: `datasets` would give the image parts a text of None. TRL puts the images before it.
                "prompt": [{"role": "user", "content": pair.prompt[0]["content"][-1]["text"]}],
                "chosen": pair.chosen,
                "rejected": pair.rejected,
            }
            for pair in pairs
        ]
    )


def losses(trainer: DPOTrainer) -> list[dict[str, float]]:
    """What the trainer logged at every step."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def train_trl(model: Any, processor: Any, pairs: list[Pair], images: ImageStore, args: DPOConfig) -> DPOTrainer:
    """Stock TRL with a live reference; returns the trainer after training a copy of `model`."""
    trainer = DPOTrainer(
        model=copy.deepcopy(model),
        ref_model=copy.deepcopy(model),
        args=args,
        train_dataset=trl_dataset(pairs, images),
        processing_class=processor,
    )
    trainer.train()
    return trainer


def train_ours(
    model: Any,
    processor: Any,
    pairs: list[Pair],
    images: ImageStore,
    args: DPOConfig,
    *,
    layout: str = "plain",
    reference: list[tuple[float, float]] | None = None,
    resume: str | None = None,
) -> PairTrainer:
    """Ours on a copy of `model`; the reference is live unless its log-probabilities are given."""
    trainer = PairTrainer(
        copy.deepcopy(model),
        ref_model=None if reference else copy.deepcopy(model),
        args=args,
        train_dataset=pair_dataset(tokenized(pairs, processor, images), reference),
        data_collator=PairCollator(processor, images, layout=layout),
        processor=processor,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


KEY = ReferenceKey("weights", "processor", "pairs", "shared", "float32", "8192")


def compute(
    path: Path,
    pairs: list[Pair],
    collator: PairCollator,
    load_model: Any,
    key: ReferenceKey = KEY,
    batch_size: int = 1,
    bf16: bool = False,
    num_workers: int = 0,
) -> Reference:
    return reference_log_probs(
        path,
        key,
        tokenized(pairs, collator.processor, collator.images),
        collator=collator,
        load_model=load_model,
        autocast=lambda: torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        batch_size=batch_size,
        state=PartialState(cpu=True),
        num_workers=num_workers,
    )


@pytest.fixture
def images(tmp_path: Path) -> ImageStore:
    (tmp_path / "images").mkdir()
    return ImageStore(tmp_path / "images")


@pytest.fixture
def processor() -> Any:
    return tiny_models.llava_onevision_processor()


@pytest.fixture
def model() -> Any:
    return tiny_models.llava_onevision()
