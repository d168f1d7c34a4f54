"""A model too large for one device in, forward passes of it out: ZeRO-3 before training.

Reference log-probabilities and the proof of the shared prefix come before there is a trainer. Under `zero3` the model is
then loaded in pieces already, a piece a process, and its layers are gathered one after the other while they compute. It is
kept in its own dtype, so the numbers are those of a whole model. All processes must run the same forwards, equally many.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.integrations.deepspeed import (
    HfDeepSpeedConfig,
    is_deepspeed_zero3_enabled,
    unset_hf_deepspeed_config,
)

# The batch size is asked for and means nothing here.
CONFIG = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}


@contextmanager
def loading_in_pieces(wanted: bool) -> Iterator[None]:
    """Within the context transformers loads every model in pieces, one a process; whole where it is not `wanted`."""
    if not wanted:
        yield
        return
    import deepspeed

    # While it loads, DeepSpeed asks its own layer how many processes there are, not torch's.
    deepspeed.init_distributed(dist_init_required=False, auto_mpi_discovery=False)
    config = HfDeepSpeedConfig(CONFIG)  # transformers forgets it when its last name goes
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del config


@contextmanager
def gathered_as_needed(model: Any) -> Iterator[None]:
    """Within the context a model that was loaded in pieces can be run forward; one that is whole is left alone."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, config=CONFIG)
    # A weight that another module than its own computes with (torch's fused attention does) is gathered only by who says
    # that a forward is under way. The engine's own forward says so; the backbone is called without it.
    for module in model.modules():
        module._parameters._in_forward = True
    try:
        yield
    finally:
        engine.destroy()
