"""How the trained model is sharded over processes: a strategy's name in, fields of the training arguments out.

`ddp` keeps the whole model in every process. `zero2` (DeepSpeed) shards gradients and optimiser, `zero3` the weights
too; `fsdp2` is PyTorch's own way to do the same. An accelerate configuration that the processes were launched with goes
before all of these. What is asked for and what one gets can differ silently, so it is checked (`check_distribution`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from trl import DPOConfig

from align import accelerator
from align.config import Config
from align.distributed.ranks import world_size
from align.errors import UserError

# Set by `accelerate launch` for the configuration it was given.
ACCELERATE_CHOICES = {"ACCELERATE_USE_DEEPSPEED": "deepspeed", "ACCELERATE_USE_FSDP": "fsdp"}
FROM_ACCELERATE = "accelerate"


def zero2() -> dict[str, Any]:
    """DeepSpeed's configuration; what is `auto` comes from the training arguments."""
    return _deepspeed({"stage": 2, "overlap_comm": True, "contiguous_gradients": True})


def zero3() -> dict[str, Any]:
    """As `zero2`, with the weights sharded too and gathered when a trainer checkpoint is
    saved (the name says 16bit, fp32 works)."""
    return _deepspeed(
        {
            "stage": 3,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    )


def fsdp2(model: nn.Module) -> dict[str, Any]:
    """accelerate's configuration, with the layers that are gathered one at a time named.

    Left to itself accelerate looks for them in `_no_split_modules`, which lists also what a model does not have.
    """
    return {
        "version": 2,
        "reshard_after_forward": True,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": decoder_layer_names(model),
        "state_dict_type": "FULL_STATE_DICT",
        # Every process has the unsharded model anyway, for the reference log-probabilities.
        "cpu_ram_efficient_loading": False,
    }


def strategy_fields(strategy: str, model: nn.Module) -> dict[str, Any]:
    """What the strategy adds to the training arguments."""
    if strategy == "zero2":
        return {"deepspeed": zero2()}
    if strategy == "zero3":
        return {"deepspeed": zero3()}
    if strategy == "fsdp2":
        return {"fsdp": "full_shard auto_wrap", "fsdp_config": fsdp2(model)}
    return {}


def chosen_strategy(config: Config, device: torch.device) -> str:
    """The strategy of this launch: accelerate's own configuration first, then `launch.strategy`; alone always `ddp`.

    Raises:
        UserError: the strategy cannot work here: checked before anything is loaded.
    """
    if any(_is_set(name) for name in ACCELERATE_CHOICES):
        return FROM_ACCELERATE
    if world_size() == 1:
        return "ddp"
    check_strategy(config.launch.strategy, device)
    return config.launch.strategy


def check_strategy(strategy: str, device: torch.device) -> None:
    """Raise UserError where several processes cannot train with this strategy."""
    if device.type in accelerator.ALONE:
        raise UserError(
            f"several processes cannot train on {device.type}", fix="use one process (launch.num_processes=1)"
        )
    if strategy == "fsdp2" and device.type == "cpu":
        raise UserError(
            "launch.strategy is fsdp2, which accelerate has for accelerators only: on a CPU it would silently train"
            " as ddp",
            fix="use ddp, zero2 or zero3, or run on GPUs",
        )
    if strategy in ("zero2", "zero3") and importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            f"launch.strategy is {strategy}, but deepspeed is not installed",
            fix="python -m pip install 'deepspeed>=0.19.8', or use ddp or fsdp2",
        )


def process_group_backend(strategy: str, device: torch.device) -> str | None:
    """What the processes are joined by, where accelerate's own choice would not do; None elsewhere.

    Saving and resuming FSDP2 gathers and broadcasts tensors in CPU memory, for which NCCL has no operations. accelerate
    adds gloo for them when the group is made after FSDP has been configured; here it is made before.
    """
    if device.type == "cuda" and strategy in ("fsdp2", FROM_ACCELERATE):
        return "cuda:nccl,cpu:gloo"
    return None


def process_state(fields: dict[str, Any]) -> PartialState:
    """This process among those of the launch, before there are training arguments; `fields` are theirs.

    Models are loaded unsharded until then, whatever accelerate was configured for: see `unsharded_models`.
    """
    with unsharded_models():
        if fields["use_cpu"]:
            return PartialState(cpu=True, backend=fields.get("ddp_backend"))
        timeout = timedelta(seconds=fields.get("ddp_timeout", DPOConfig.ddp_timeout))
        return PartialState(backend=fields.get("ddp_backend"), timeout=timeout)


def without_compiled_collectives(strategy: str, device: torch.device) -> None:
    """Keep DeepSpeed on a CPU with gloo, instead of collectives in shared memory that it compiles at its first use.

    That takes a C++ compiler and half a minute, again whenever another environment was used meanwhile, and a kill
    within it leaves a lock behind, for whose release every later run waits without end.
    """
    by_deepspeed = strategy in ("zero2", "zero3") or _is_set("ACCELERATE_USE_DEEPSPEED")
    if device.type == "cpu" and by_deepspeed:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextlib.contextmanager
def unsharded_models() -> Iterator[None]:
    """Within the context models are loaded unsharded, whatever accelerate was configured for."""
    hidden = {name: os.environ.pop(name) for name in ACCELERATE_CHOICES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def decoder_layer_names(model: nn.Module) -> list[str]:
    """The class names of the language model's layers: the elements of its longest list of modules.

    >>> decoder = nn.Module()
    >>> decoder.layers = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    >>> decoder_layer_names(decoder)
    ['Linear']
    """
    decoder: nn.Module = model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList) and len(module)]
    # Towers inside the decoder may have more layers than the decoder; its own list stands nearest to it.
    own = [module for module in decoder.children() if isinstance(module, nn.ModuleList) and len(module)]
    layers = max(own or lists, key=len)
    return sorted({type(layer).__name__ for layer in layers})


def keep_outputs_exact(accelerator: Accelerator) -> None:
    """Let FSDP2 return what the model computes, and add up gradients in float32; weights are gathered as they were.

    accelerate's policy for bf16 also rounds inputs and outputs of every wrapped module, the model's own among them: the
    log-probability of every token would be wrong by up to 0.4 %, against a reference that is float32.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    policy = getattr(plugin, "mixed_precision_policy", None)
    if plugin is not None and isinstance(policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = dataclasses.replace(
            policy, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
        )


def check_distribution(strategy: str, distributed_type: Any) -> None:
    """Raise UserError where accelerate trains in another way than asked for."""
    found = str(getattr(distributed_type, "value", distributed_type)).upper()
    expected = {"zero2": "DEEPSPEED", "zero3": "DEEPSPEED", "fsdp2": "FSDP"}.get(strategy, found)
    if found != expected:
        raise UserError(
            f"launch.strategy is {strategy}, but accelerate trains as {found}",
            fix="on a CPU only ddp, zero2 and zero3 work; on GPUs check the accelerate configuration",
        )


def _deepspeed(zero: dict[str, Any]) -> dict[str, Any]:
    automatic = (
        "train_micro_batch_size_per_gpu",
        "train_batch_size",
        "gradient_accumulation_steps",
        "gradient_clipping",
    )
    return dict.fromkeys(automatic, "auto") | {
        "zero_optimization": zero,
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        # The projector's own learning rate makes param groups that DeepSpeed has no test of.
        "zero_allow_untested_optimizer": True,
    }


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("true", "1", "yes")
