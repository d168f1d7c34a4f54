"""One of two processes of `test_processes.py`: gradients of a model that FSDP2 has sharded, written to a file."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from trl.trainer.utils import add_fused_lm_head

from align.dpo.collator import PairCollator
from align.dpo.shared_forward import add_shared_rows
from align.media.images import ImageStore
from align.records import Pair, read_jsonl
from tests import tiny_models
from tests.dpo.conftest import tokenized


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


def write_gradients(folder: Path, output: Path) -> None:
    images = ImageStore(folder)
    pairs = read_jsonl(images.root / "pairs.jsonl", Pair)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = shared_model()
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    # As accelerate does: the head is a group of its own, whose module is never called in training.
    fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    mean_loss(model, pairs[dist.get_rank() :: dist.get_world_size()], images).backward()
    named = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    gradients = {name: gradient.full_tensor() for name, gradient in named.items()}
    if dist.get_rank() == 0:
        torch.save(gradients, output)
    dist.destroy_process_group()
