"""A checkpoint and the settings in, a ready engine out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from align.config import ModelSettings
from align.engines.base import Engine


def open_engine(
    checkpoint: str,
    settings: ModelSettings,
    *,
    open_image: Callable[[Any], Any],
    processor: dict[str, Any] | None = None,
    shared_prefix: str = "auto",
    batch_size: int | None = None,
) -> Engine:
    """Load a checkpoint for inference in this process.

    Raises:
        UserError: the checkpoint cannot be opened (see `align.models.load`).
    """
    from align.engines.local import LocalEngine
    from align.models.load import load_model, load_processor
    from align.models.placement import pick_device, pick_dtype

    device = pick_device(settings.device)
    model = load_model(
        checkpoint,
        dtype=pick_dtype(settings.dtype, device),
        device=device,
        attn_implementation=settings.attention,
        allow_pickle=settings.allow_pickle,
    )
    return LocalEngine(
        model.eval(),
        load_processor(checkpoint, **(processor or {})),
        open_image=open_image,
        shared_prefix=shared_prefix,
        batch_size=batch_size,
    )
