"""A finished training in, the round's checkpoint out: in the form of its parent, and compared with what was trained."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config

from align.dpo.sharding.gather import gather_weights, merge_adapter
from align.dpo.trainer import PairTrainer
from align.dpo.verify_saved import Probe, check_learnt, verify_saved
from align.errors import UserError
from align.models.device import DTYPES
from align.models.load import read_config
from align.models.save import Code, plain_weights, save_checkpoint
from align.monitoring.cost import save_cost
from align.prefix.attention import PrefixUnsupported, stop_shared_prefix

ADAPTER = "adapter"

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin


def save_trained(
    trainer: PairTrainer,
    processor: ProcessorMixin,
    folder: Path,
    *,
    policy: str,
    load: Callable[..., Any],
    code: Code = "parent",
) -> None:
    """Write the finished checkpoint in the form of its parent, with the trainer's record of how it came about.

    All processes call it. `load(checkpoint, device=...)` opens a model again where the trained one is sharded. `code`:
    as in `save_checkpoint`. An adapter is merged, and kept beside the checkpoint in peft's form.

    Raises:
        UserError: the folder does not open as the model that was trained, or training has changed nothing; the folder
            is removed.
    """
    probe = Probe.take(trainer)
    model = trainer.accelerator.unwrap_model(trainer.model)
    gathered = gather_weights(trainer)
    sharded = is_deepspeed_zero3_enabled()
    unset_hf_deepspeed_config()
    if trainer.is_world_process_zero():
        if isinstance(model, PeftModel):
            save_adapter(model, gathered, folder.with_name(ADAPTER), policy)
            model, gathered = merge_adapter(model, gathered, lambda: load(policy, device="cpu")), None
        elif sharded:
            # A model that was loaded in shards does not remember the names of its tensors on disk.
            model = load(policy, device="cpu")
    restore_forward(model)
    if trainer.is_world_process_zero():
        save_checkpoint(
            model,
            processor,
            folder,
            parent=policy if Path(policy).is_dir() else None,
            state_dict=gathered,
            dtype=stored_dtype(policy),
            code=code,
        )
        try:
            verify_saved(folder, model, plain_weights(model, gathered, None), probe, stored_dtype(policy))
            if Path(policy).is_dir():
                check_learnt(folder, Path(policy))
        except UserError:
            shutil.rmtree(folder)
            shutil.rmtree(folder.with_name(ADAPTER), ignore_errors=True)
            raise
        trainer.state.save_to_json(str(folder / "trainer_state.json"))
    save_cost()
    trainer.accelerator.wait_for_everyone()


def save_adapter(model: PeftModel, gathered: dict[str, torch.Tensor] | None, folder: Path, policy: str) -> None:
    """Write the adapter alone, for whoever wants to load it on the round's policy: `PeftModel.from_pretrained`."""
    shutil.rmtree(folder, ignore_errors=True)
    for config in model.peft_config.values():
        config.base_model_name_or_path = policy
    model.save_pretrained(str(folder), state_dict=gathered, save_embedding_layers=False)


def stored_dtype(policy: str) -> torch.dtype | None:
    """The dtype of the parent's weights on disk, which the checkpoint keeps; None where it does not say."""
    config = read_config(policy)
    return DTYPES.get(str(config.get("torch_dtype") or config.get("dtype")))


def restore_forward(model: PreTrainedModel) -> None:
    """Undo what training has done to `model.forward` and to its attention."""
    model.__dict__.pop("forward", None)
    with contextlib.suppress(PrefixUnsupported, AttributeError):
        stop_shared_prefix(model)
