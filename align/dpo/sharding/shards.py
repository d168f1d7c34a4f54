"""A model too large for one device in, forward passes of it out: ZeRO-3 before training.

Reference log-probabilities and the equivalence check of the shared prefix come before there is a trainer. Under `zero3`
the model is then sharded already, one shard per process, and its layers are gathered one after the other while they
compute. It has the dtype of an unsharded model, so the numbers are the same.
All processes must run the same forwards, equally many.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from transformers.integrations.deepspeed import (
    HfDeepSpeedConfig,
    is_deepspeed_zero3_enabled,
    unset_hf_deepspeed_config,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Models that were run sharded.
_run: WeakSet[Any] = WeakSet()


@contextmanager
def loading_sharded(wanted: bool, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Within the context transformers loads every model in shards of `dtype`, one per process, where that is `wanted`.

    At the end the shards of those that were run are given back, and they cannot be used any more.
    """
    if not wanted:
        yield
        return
    init_deepspeed()
    config = HfDeepSpeedConfig(_config(dtype))  # transformers forgets it when its last name goes
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del config
        # Lists and caches of DeepSpeed's hold a model for good: it would lie beside the one that is trained.
        for parameter in [parameter for model in _run for parameter in model.parameters()]:
            parameter.ds_tensor, parameter.data = None, parameter.data.new_empty(0)
        _run.clear()


def init_deepspeed() -> None:
    """Tell DeepSpeed's own layer of the processes: while a model loads it asks that, not torch, how many there are."""
    import deepspeed

    deepspeed.init_distributed(dist_init_required=False, auto_mpi_discovery=False)


@contextmanager
def gathered_as_needed(model: PreTrainedModel) -> Iterator[None]:
    """Within the context a sharded model can be run forward; one that is unsharded is left alone."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed

    _run.add(model)
    engine, *_ = deepspeed.initialize(model=model, config=_config(next(model.parameters()).dtype))
    # A weight that another module than its own computes with (torch's fused attention does) is gathered only by who
    # says that a forward is running. The engine's own forward says so; the backbone is called without it.
    _say_whether_forward(model, True)
    try:
        yield
    finally:
        _say_whether_forward(model, False)
        engine.destroy()


def _config(dtype: torch.dtype) -> dict[str, Any]:
    return {
        # The batch size is asked for and means nothing here.
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        # Shards have the dtype that is enabled, whatever a model is loaded with.
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }


def _say_whether_forward(model: PreTrainedModel, running: bool) -> None:
    for module in model.modules():
        module._parameters._in_forward = running
