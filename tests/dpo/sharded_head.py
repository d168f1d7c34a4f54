"""One of two processes of `test_fsdp2.py`: gradients and steps of a model that FSDP2 has sharded, in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from trl.trainer.utils import add_fused_lm_head

from align.config import ImagePreference
from align.distributed.ranks import world_size
from align.dpo.collator import PairCollator, pair_dataset
from align.dpo.rows import make_batches, pair_weights
from align.dpo.shared_forward import add_shared_rows
from align.dpo.trainer import PairTrainer
from align.media.images import ImageStore
from align.prefix.rows import unwrap
from align.records import Pair, read_jsonl
from tests import tiny_models
from tests.dpo.conftest import make_args, tokenized

ADAPTERS = {"an adapter": LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "all weights": None}
LEARNING_RATES = {"an adapter": 0.5, "all weights": 0.02}


def mean_loss(model: torch.nn.Module, pairs: list[Pair], images: ImageStore) -> torch.Tensor:
    """Minus the mean over pairs of the log-probability of the chosen over that of the rejected response."""
    processor = tiny_models.llava_onevision_processor()
    batch = PairCollator(processor, images, "shared").collate(tokenized(pairs, processor, images))
    labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
    chosen, rejected = model(**batch, labels=labels, fused_lm_head=True).log_probs.sum(dim=1).chunk(2)
    return (rejected - chosen).mean()


def shared_model() -> torch.nn.Module:
    model = tiny_models.llava_onevision()
    add_fused_lm_head(model)
    add_shared_rows(model)
    return model


def shard(model: torch.nn.Module) -> None:
    """As accelerate does: layer by layer, and the head a group of its own, whose module is never called in training."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    inner = unwrap(model)
    for part in [*inner.model.language_model.layers, inner.lm_head, model]:
        fully_shard(part, mesh=mesh)


def take_steps(folder: Path, adapter: str) -> dict[str, Any]:
    """Two epochs of the real trainer on rows of questions with corrupted pictures: every step's loss, and the weights.

    Two micro-batches are a step, whether one process takes both or two take one each. Plain gradient descent: Adam
    makes much of gradients that are 0 but for rounding.
    """
    images, processor = ImageStore(folder), tiny_models.llava_onevision_processor()
    pairs = tokenized(read_jsonl(folder / "questions.jsonl", Pair), processor, images)
    torch.manual_seed(0)
    trainer = PairTrainer(
        tiny_models.llava_onevision(),
        args=make_args(folder, gradient_accumulation_steps=2 // world_size()),
        train_dataset=pair_dataset(
            pairs,
            [(-30.0 - n % 3, -29.0 + n % 2) for n in range(len(pairs))],
            pair_weights(pairs, "question"),
            corrupted=[-31.0 + n % 4 for n in range(len(pairs))],
        ),
        data_collator=PairCollator(
            processor,
            images,
            "shared",
            grouping="question",
            always_images=True,
            corruption="crop",
            pool=tuple(sorted({name for pair in pairs for name in pair.image_files})),
        ),
        processor=processor,
        peft_config=ADAPTERS[adapter],
        batches=make_batches(pairs, "question", num_rows=1, max_tokens=350, seed=0, copies=2),
        image_preference=ImagePreference(corruption="crop", weight=0.7, anchor=0.4),
    )
    model = trainer.model
    if world_size() > 1:
        shard(model)
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATES[adapter], momentum=0.9
    )
    model.train()
    losses = []
    for epoch in range(2):
        trainer.state.epoch = epoch
        batches = iter(trainer.get_train_dataloader())
        while step := trainer.get_batch_samples(batches, trainer.args.gradient_accumulation_steps, trainer.args.device)[
            0
        ]:
            trainer.current_gradient_accumulation_steps = len(step)
            loss = torch.stack([trainer.training_step(model, batch) for batch in step]).sum()
            losses.append(trainer.accelerator.reduce(loss, "mean").item())
            optimizer.step()
            optimizer.zero_grad()
            trainer.state.global_step += 1
    named = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {
        "batches": len(trainer.batches),
        "losses": losses,
        "weights": {name: whole(parameter) for name, parameter in named.items()},
    }


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def write_sharded(folder: Path, output: Path) -> None:
    images = ImageStore(folder)
    pairs = read_jsonl(images.root / "pairs.jsonl", Pair)
    dist.init_process_group("gloo")
    model = shared_model()
    shard(model)
    mean_loss(model, pairs[dist.get_rank() :: dist.get_world_size()], images).backward()
    named = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    gradients = {name: gradient.full_tensor() for name, gradient in named.items()}
    steps = {adapter: take_steps(folder, adapter) for adapter in ADAPTERS}
    if dist.get_rank() == 0:
        torch.save({"gradients": gradients, **steps}, output)
    dist.destroy_process_group()
