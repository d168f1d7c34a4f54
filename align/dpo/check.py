"""A configuration in; what of its training cannot work out, before any weight is loaded.

The trainer itself is built, on the model without storage (torch's meta device): what TRL, transformers and peft refuse,
they refuse here, and not after sampling, scoring and the reference.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.state import AcceleratorState

from align.config import Config
from align.distributed.ranks import world_size
from align.dpo.collator import PairCollator, pair_dataset
from align.dpo.held_out import split_pairs
from align.dpo.settings import (
    AUTO,
    checkpointing_field,
    own_batches,
    planned_steps,
    training_arguments,
    training_fields,
)
from align.dpo.sharding.strategies import unsharded_models
from align.dpo.tokenize import TokenizedPair, check_lengths, tokenize_pairs
from align.dpo.trainer import PairTrainer
from align.errors import UserError
from align.media.images import ImageStore
from align.models.limits import position_limit
from align.models.load import check_checkpoint, load_processor, read_config
from align.models.lora import adapter_outside, check_frozen, check_modules_to_save, check_tied_weights, lora_config
from align.models.meta import meta_model, model_to_train
from align.models.modules import check_projector
from align.records import Pair

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

# What has no meaning without storage; the optimiser of these names computes the same as the plain one.
NOT_ON_META = {"use_cpu": True, "bf16": False, "fp16": False, "tf32": None, "report_to": "none"}
FUSED = ("adamw_torch_fused", "adamw_apex_fused")


def check_trained(config: Config, policy: str) -> None:
    """Look at what would be trained, without weights.

    Raises:
        UserError: the checkpoint is not whole, an adapter finds no layers or would untie weights, nothing is left to
            train, an adapter trains a frozen part, the projector has a rate and is not trained, or TRL refuses the
            settings.
    """
    check_checkpoint(policy, allow_pickle=config.model.allow_pickle)
    trained = model_to_train(policy, config.dpo.lora, config.dpo.freeze)
    if config.dpo.projector_learning_rate_multiplier != 1.0:
        check_projector(trained)
    adapter = lora_config(config.dpo.lora)
    if adapter is not None:
        plain = meta_model(policy)
        adapter = adapter_outside(plain, adapter, config.dpo.freeze)
        check_frozen(plain, trained, config.dpo.freeze)
        check_modules_to_save(plain, adapter)
        check_tied_weights(plain, trained)
    # A trainer asks for the other processes of a launch, which are joined by whoever trains.
    if world_size() == 1:
        try_trainer(config, policy, trained if adapter is None else meta_model(policy), adapter)


def check_pairs(config: Config, pairs: Sequence[Pair], processor: ProcessorMixin, images: ImageStore) -> dict[str, int]:
    """Tokenise and measure pairs as training will; gives how many would be left out, by reason.

    Raises:
        UserError: no pair can be used, some are too long and may not be left out, or they are too few for a step.
    """
    tokenized = tokenize_pairs(pairs, processor, images)
    dropped = {reason: len(ids) for reason, ids in tokenized.dropped.items()}
    limit = config.dpo.max_length or position_limit(read_config(config.policy))
    too_long = (
        check_lengths(tokenized.pairs, limit, drop=config.dpo.on_too_long == "drop") if limit is not None else set()
    )
    if too_long:
        dropped["too long"] = len(too_long)
    with unsharded_models():
        fields = training_fields(config, Path(), torch.device("cpu"), torch.float32)
    num_processes = config.launch.num_processes * config.launch.num_machines
    fitting = [pair for pair in tokenized.pairs if pair.id not in too_long]
    if config.dpo.eval_steps is not None:
        fitting, _ = split_pairs(fitting, config.dpo.held_out, config.seed)
    planned_steps(fields, len(fitting), num_processes, own_batches(config, fields, fitting))
    return dropped


class _WithoutStorage(PairTrainer):
    def _move_model_to_device(self, model: PreTrainedModel, device: Any) -> None:
        """Meta tensors have nothing that could be moved."""


def try_trainer(config: Config, policy: str, model: PreTrainedModel, adapter: Any) -> None:
    """Build the trainer on a model without storage, with its optimiser and its schedule.

    Raises:
        UserError: TRL, transformers or peft refuse the settings, in their words.
    """
    images = ImageStore(Path())
    row = TokenizedPair("pair", [], "", 1, [0], [1])
    live_adapter = config.dpo.reference == "live" and adapter is not None
    if adapter is not None:
        # Other ways to begin compute with the weights, which are not there.
        adapter = replace(adapter, init_lora_weights=True)
    with tempfile.TemporaryDirectory() as folder, unsharded_models():
        fields = training_fields(config, Path(folder), torch.device("cpu"), torch.float32) | NOT_ON_META
        if fields[checkpointing_field()] == AUTO:
            fields[checkpointing_field()] = True
        if fields.get("optim") in (None, *FUSED):
            fields["optim"] = "adamw_torch"
        if config.dpo.reference == "live" and adapter is None:
            # With a second model in memory this goes; there is none here.
            fields.pop("sync_ref_model", None)
        try:
            trainer = _WithoutStorage(
                model,
                args=training_arguments(fields, config.dpo.trainer_fields()),
                train_dataset=pair_dataset([row], None if live_adapter else [(0.0, 0.0)]),
                eval_dataset=None if config.dpo.eval_steps is None else pair_dataset([row], [(0.0, 0.0)]),
                data_collator=PairCollator(None, images, "plain"),
                processor=load_processor(policy, **config.model.processor),
                peft_config=adapter,
            )
            trainer.create_optimizer_and_scheduler(num_training_steps=10)
        except UserError:
            raise
        except Exception as error:
            # Whatever their constructors raise is about the settings: nothing else has been given to them.
            raise UserError(
                f"training cannot begin with this dpo section: {error}", fix="change it as the message says"
            ) from None
        finally:
            # Which device and how many processes there are is asked again by whoever trains.
            AcceleratorState._reset_state(reset_partial_state=True)
