"""A trained model in, perhaps sharded over processes or adapted; what `save_checkpoint` writes out.

All processes call `gather_weights`; the rest happens on the main one. Under ZeRO-2 and DDP every process has all
weights and nothing is gathered. An adapter is merged into the weights, and where those are sharded or quantised, into
weights loaded afresh from the round's policy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled


def gather_weights(trainer: Any) -> dict[str, Tensor] | None:
    """On the main process all weights by name, in CPU memory; None where the model itself has all of them.

    Names are those in memory, with what wrappers add: `align.models.save` takes them back. What transformers itself
    writes under ZeRO-3 has names of neither kind (`model.model.`), since sharded weights are loaded by a way of their
    own (https://github.com/huggingface/transformers/pull/43303), which leaves the model without its names on disk.
    """
    if not (is_deepspeed_zero3_enabled() or trainer.is_fsdp_enabled):
        return None
    return trainer.accelerator.get_state_dict(trainer.model_wrapped)


def merge_adapter(model: PeftModel, gathered: dict[str, Tensor] | None, load_unsharded: Callable[[], Any]) -> Any:
    """The model with its adapter merged into it, on the main process.

    `load_unsharded` opens the round's policy again: needed where the base weights are sharded (`gathered` is given) or
    quantised, since merging into four bits would round what was learnt away.
    """
    quantised = getattr(model.get_base_model(), "is_quantized", False)
    if gathered is None and not quantised:
        return model.merge_and_unload()
    adapter = get_peft_model_state_dict(model, state_dict=gathered)
    unsharded = get_peft_model(load_unsharded(), model.peft_config["default"])
    set_peft_model_state_dict(unsharded, {name: tensor.cpu() for name, tensor in adapter.items()})
    return unsharded.merge_and_unload()
