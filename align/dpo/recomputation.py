"""`dpo.gradient_checkpointing: auto`: what a step needs and what a GPU has in, how many layers are recomputed out.

Recomputing every layer costs a third of a step's forward and backward; where memory is free it buys nothing. The memory
model (`align.dpo.step_memory`) counts the largest batch that the pairs can make. Where it was wrong, the training that
runs out of memory begins again with every layer recomputed (`align.dpo.auto_batch_size`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from align import accelerator
from align.config import Config
from align.distributed.ranks import least_of_all, world_size
from align.dpo.collator import LayoutName
from align.dpo.rows import RowBatch
from align.dpo.settings import AUTO, checkpointing_field
from align.dpo.step_memory import GIB, STRATEGIES, USABLE, How, StepBatch, least_recomputation, training_memory
from align.dpo.tokenize import TokenizedPair
from align.log import log
from align.models.lora import is_quantised
from align.models.meta import model_to_train
from align.models.shapes import model_shape


@dataclass(frozen=True)
class Recomputation:
    """Whether layers are recomputed in backward, and how many of the language model's last ones are not."""

    checkpointing: bool
    kept_layers: int = 0


def choose_recomputation(
    config: Config,
    policy: str,
    fields: dict[str, Any],
    batch: StepBatch,
    *,
    layout: LayoutName,
    strategy: str,
    device: torch.device,
) -> Recomputation:
    """What the configuration says; with `auto` as little as memory demands for `batch`, the same in every process."""
    setting = fields[checkpointing_field()]
    if setting != AUTO:
        return Recomputation(bool(setting))
    usable = usable_bytes(device)
    if usable is None or strategy not in STRATEGIES:
        log.info("gradient checkpointing: every layer, since the memory of this training is not known")
        return Recomputation(True)
    shape = model_shape(model_to_train(policy, config.dpo.lora, config.dpo.freeze))
    how = how_trained(config, fields, layout=layout, strategy=strategy)
    chosen = least_recomputation(shape, batch, how, usable)
    num_layers, needed = shape.text.num_layers, training_memory(shape, batch, chosen).total
    recomputed = num_layers - chosen.kept_layers if chosen.checkpointing else 0
    log.info(
        "gradient checkpointing: %d of %d layers are recomputed; %.1f of %.1f GiB are expected to be used",
        recomputed,
        num_layers,
        needed / GIB,
        usable / GIB,
    )
    return Recomputation(chosen.checkpointing, chosen.kept_layers)


def usable_bytes(device: torch.device) -> int | None:
    """Of the device for this process, the least of all processes; None where torch cannot say."""
    if device.type == "cpu" or accelerator.free_memory(device) is None:
        return None
    free, total = torch.accelerator.get_memory_info(device)
    others = total - free - torch.accelerator.memory_reserved(device)
    return least_of_all(int((total - max(others, 0)) * USABLE), device)


def largest_batch(
    pairs: Sequence[TokenizedPair], fields: dict[str, Any], own: Sequence[RowBatch] | None = None, copies: int = 1
) -> StepBatch:
    """The batch of `own` that has the most tokens; else the longest prompt with the longest responses, in every row.

    `copies`: 2 where every row has another beside it with corrupted pictures.
    """
    if own is not None:
        largest = max(own, key=lambda batch: batch.tokens)
        half = largest.size.responses // 2
        return StepBatch(largest.copies * largest.num_rows, largest.size.prompt, largest.size.responses - half, half)
    return StepBatch(
        num_rows=copies * int(fields["per_device_train_batch_size"]),
        prompt_tokens=max(pair.prompt_tokens for pair in pairs),
        chosen_tokens=max(len(pair.chosen_ids) for pair in pairs),
        rejected_tokens=max(len(pair.rejected_ids) for pair in pairs),
    )


def how_trained(config: Config, fields: dict[str, Any], *, layout: LayoutName, strategy: str) -> How:
    """The training in the terms of the memory model."""
    weight_bytes = 4 if config.model.dtype in ("auto", "float32") else 2
    return How(
        strategy=strategy,
        num_processes=world_size(),
        weight_bytes=weight_bytes,
        compute_bytes=2 if fields["bf16"] or fields.get("fp16") else weight_bytes,
        checkpointing=True,
        shared=layout == "shared",
        accumulates=int(fields["gradient_accumulation_steps"]) > 1,
        repeated_keys=layout != "shared",
        second_model=config.dpo.reference == "live" and config.dpo.lora is None,
        quantised=is_quantised(config.dpo.lora),
        dropout=fields.get("disable_dropout") is False,
        optimizer=str(fields.get("optim", "adamw_torch")),
    )
