"""Questions in; how many tokens, patches and pixels each is as a model reads it out, from the headers of images alone.

The processor is run on blank images, once for every new combination of sizes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from align.dpo.step_memory import StepBatch
from align.dpo.tokenize import encode_prompts, structured, tokenize_pairs
from align.media.images import ImageStore
from align.records import Pair

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin


@dataclass(frozen=True)
class PromptSize:
    """A question as the model reads it: all tokens, those that stand for images, and what the towers get.

    `patch_scores`: pairs of patches that see one another. `prepared_s`: processor seconds that its images took here.
    """

    id: str
    tokens: int
    visual_tokens: int
    patches: int
    pixels: int
    patch_scores: float = 0.0
    prepared_s: float = 0.0


class PromptMeter:
    """Counts what prompts with images cost; `patch_px` is the side of a patch."""

    def __init__(self, processor: ProcessorMixin, images: ImageStore, patch_px: int = 14) -> None:
        self.processor = processor
        self.images = images
        self.patch_px = patch_px
        self._known: dict[tuple[tuple[int, int], ...], tuple[int, int, int, float, float]] = {}

    def size(self, id_: str, messages: Sequence[dict[str, Any]], references: Sequence[str]) -> PromptSize:
        """Raises UserError for an image that cannot be used."""
        prompt = self.processor.apply_chat_template(structured(messages), tokenize=False, add_generation_prompt=True)
        text_tokens = len(self.processor.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        sizes = tuple(self.images.size(reference) for reference in references)
        if sizes not in self._known:
            self._known[sizes] = self._measure(prompt, text_tokens, sizes)
        extra, patches, pixels, scores, prepared_s = self._known[sizes]
        # The template writes one placeholder an image, which is a visual token itself.
        visual = extra + len(sizes) if extra else 0
        return PromptSize(id_, text_tokens + extra, visual, patches, pixels, scores, prepared_s)

    def _measure(
        self, prompt: str, text_tokens: int, sizes: tuple[tuple[int, int], ...]
    ) -> tuple[int, int, int, float, float]:
        blanks = [Image.new("RGB", size) for size in sizes]
        if not self._known:
            # The first call also loads what the processor needs.
            encode_prompts(self.processor, [prompt], [blanks])
        started = time.process_time()
        inputs = encode_prompts(self.processor, [prompt], [blanks])
        prepared_s = time.process_time() - started
        pictures = [value for value in inputs.values() if hasattr(value, "dtype") and value.is_floating_point()]
        pixels = sum(value.numel() for value in pictures)
        patches, scores = max(
            (patch_counts(tuple(value.shape), self.patch_px, len(sizes)) for value in pictures), default=(0, 0.0)
        )
        return inputs["input_ids"].shape[1] - text_tokens, patches, pixels, scores, prepared_s


def patch_counts(shape: tuple[int, ...], patch_px: int, num_images: int = 1) -> tuple[int, float]:
    """Patches of an image tensor, and the pairs that see one another.

    Whole tiles `(..., 3, height, width)`, each by itself, or already one patch a row `(n, values)`, an image by itself.

    >>> patch_counts((1, 5, 3, 28, 28), 14), patch_counts((64, 588), 14)
    ((20, 80.0), (64, 4096.0))
    """
    if len(shape) < 4:
        count = shape[0] if len(shape) == 2 else 0
        return count, count * count / max(num_images, 1)
    tiles = 1
    for number in shape[:-3]:
        tiles *= number
    in_tile = (shape[-2] // patch_px) * (shape[-1] // patch_px)
    return tiles * in_tile, float(tiles * in_tile * in_tile)


def patch_size(model: PreTrainedModel) -> int:
    """Pixels of a patch's side, from the model's vision config."""
    vision = getattr(model.config, "vision_config", None)
    size = getattr(vision, "patch_size", None) or 14
    return size if isinstance(size, int) else size[0]


def step_batch(processor: ProcessorMixin, pairs: Sequence[Pair], images: ImageStore, patch_px: int = 14) -> StepBatch:
    """What a batch of these pairs is to the memory model: padded to the longest prompt and responses."""
    meter = PromptMeter(processor, images, patch_px)
    sizes = [meter.size(pair.id, pair.prompt, pair.images) for pair in pairs]
    tokens = tokenize_pairs(pairs, processor, images).pairs
    return StepBatch(
        num_rows=len(pairs),
        prompt_tokens=max(size.tokens for size in sizes),
        chosen_tokens=max(len(pair.chosen_ids) for pair in tokens),
        rejected_tokens=max(len(pair.rejected_ids) for pair in tokens),
        patches=sum(size.patches for size in sizes),
        pixels=sum(size.pixels for size in sizes),
    )
