"""A vision tower in, embeddings of pictures out, of length 1, for finding near pictures that hashes miss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from transformers import AutoModel

# By this name also without torchvision: under the short one transformers 5.17 has a stand-in that asks for it.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from align.config import ModelSettings
from align.errors import UserError
from align.models.device import pick_device, pick_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

BATCH_SIZE = 32


def open_image_embedder(checkpoint: str, settings: ModelSettings) -> Callable[[Iterable[Image.Image]], np.ndarray]:
    """A function from n pictures to (n, D) float32 rows of length 1: of a CLIP or SigLIP model,
    or of a vision encoder alone.

    Raises:
        UserError: the checkpoint cannot be opened, or gives no one vector a picture.
    """
    device = pick_device(settings.device)
    try:
        model = AutoModel.from_pretrained(
            checkpoint, dtype=pick_dtype(settings.dtype, device), use_safetensors=True, trust_remote_code=False
        )
        processor = AutoImageProcessor.from_pretrained(checkpoint, trust_remote_code=False)
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise UserError(
            f"the vision tower cannot be opened: {error}", where=checkpoint, fix="name a CLIP or SigLIP checkpoint"
        ) from None
    model = model.to(device).eval()

    def embed(pictures: Iterable[Image.Image]) -> np.ndarray:
        rows, batch = [], []
        for picture in pictures:
            batch.append(picture)
            if len(batch) == BATCH_SIZE:
                rows.append(_embed(model, processor, batch, checkpoint))
                batch = []
        if batch:
            rows.append(_embed(model, processor, batch, checkpoint))
        return np.concatenate(rows)

    return embed


@torch.no_grad()
def _embed(
    model: PreTrainedModel, processor: ProcessorMixin, batch: Sequence[Image.Image], checkpoint: str
) -> np.ndarray:
    pixels = processor(images=list(batch), return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
    encode = getattr(model, "get_image_features", model)
    found = encode(pixel_values=pixels)
    vectors = found if isinstance(found, torch.Tensor) else getattr(found, "pooler_output", None)
    if vectors is None or vectors.dim() != 2:
        raise UserError(
            "this model gives no one vector a picture", where=checkpoint, fix="name a CLIP or SigLIP checkpoint"
        )
    return torch.nn.functional.normalize(vectors.float(), dim=-1).cpu().numpy()
