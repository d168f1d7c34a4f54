"""Prompts and images in, vLLM's multi-modal inputs out: what every family's processor makes of them, item by item.

vLLM tokenises a rendered prompt in which one special token (`chat_template.image_mark`) stands for each image, asks for
the image tensors of those images that are not in its cache, and puts each image's placeholders where its mark stands.
Whether an image is cut in tiles may depend on how many a prompt has, so that number is part of the processor's
arguments and with them of the cache's key.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import BatchFeature
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)

from align.engines.vllm.chat_template import image_mark
from align.models.load import load_processor
from align.models.open_image import open_image

NUM_IMAGES = "num_images"
NUM_TOKENS = "num_tokens"


@dataclass(frozen=True)
class Images:
    """What vLLM must know of a family's images.

    `flat`: names of tensors that
    lie flat over the images, each with how many rows the images have in it, from all tensors. `sizes_px`: from the
    processor, image sizes among which is one with the most visual tokens. `most`: images that a prompt may have.
    """

    flat: Mapping[str, Callable[[Mapping[str, torch.Tensor]], torch.Tensor]]
    sizes_px: Callable[[Any], Iterable[tuple[int, int]]]
    most: int | None = None


@functools.cache
def open_processor(folder: str, settings: str) -> Any:
    """The processor of a folder with settings (JSON). Raises UserError for what it does not know."""
    return load_processor(folder, **json.loads(settings))


class ImagesInfo(BaseProcessingInfo):
    """Counts without pixels."""

    def __init__(self, context: Any, images: Images) -> None:
        super().__init__(context)
        self.images = images

    def get_hf_processor(self, **kwargs: object) -> Any:
        """Our processor with the settings of `--mm-processor-kwargs` and of the request."""
        settings = self.ctx.get_merged_mm_kwargs(kwargs)
        settings.pop(NUM_IMAGES, None)
        return open_processor(self.ctx.model_config.model, json.dumps(settings, sort_keys=True))

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """The most images of a prompt; None: any number."""
        return {"image": self.images.most}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """The most tokens of one image (vLLM profiles memory with it)."""
        size = self.largest_px(seq_len)
        return {"image": self.get_hf_processor().num_image_tokens(*size, 1)}

    def largest_px(self, seq_len: int) -> tuple[int, int]:
        """Width and height of an image with as many tokens as any that fits `seq_len` tokens;
        else the smallest known."""
        processor = self.get_hf_processor()
        counts = {size: processor.num_image_tokens(*size, 1) for size in self.images.sizes_px(processor)}
        fitting = {size: count for size, count in counts.items() if count <= seq_len}
        return max(fitting, key=fitting.__getitem__) if fitting else min(counts, key=counts.__getitem__)


class DummyImages(BaseDummyInputsBuilder[ImagesInfo]):
    """The largest prompt, which vLLM measures its memory with."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """A prompt of so many images (vLLM profiles memory with it)."""
        return image_mark(self.info.get_hf_processor()) * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]) -> Any:
        """The largest images that may come (vLLM profiles memory with them)."""
        width, height = self.info.largest_px(seq_len)
        count, overrides = mm_counts.get("image", 0), mm_options.get("image")
        return {"image": self._get_dummy_images(width=width, height=height, num_images=count, overrides=overrides)}


class ImagesProcessor(BaseMultiModalProcessor[ImagesInfo]):
    """Images to tensors by the family's own processor, prompts to prompts with placeholders."""

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """As of the base class, with the number of images among the arguments,
        since a single image may be cut otherwise."""
        count = inputs.mm_data_items.get_all_counts().get("image", 0)
        kwargs = {**inputs.hf_processor_mm_kwargs, NUM_IMAGES: count}
        return super().apply(replace(inputs, hf_processor_mm_kwargs=kwargs), timing_ctx)

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]) -> BatchFeature:
        pixels = self.info.get_hf_processor(**hf_kwargs).new_pixels()
        counts = [pixels.add_image(open_image(image), hf_kwargs[NUM_IMAGES]) for image in hf_data["images"]]
        arrays = in_dtype(pixels.arrays(), self.info.ctx.model_config.dtype)
        return BatchFeature({**arrays, NUM_TOKENS: torch.tensor(counts)})

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        flat = self.info.images.flat
        return {
            name: MultiModalFieldConfig.flat_from_sizes("image", flat[name](hf_inputs))
            if name in flat
            else MultiModalFieldConfig.batched("image")
            for name in hf_inputs
        }

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, Any],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptReplacement]:
        processor = self.info.get_hf_processor(**hf_processor_mm_kwargs)
        items = out_mm_kwargs.get("image", [])

        def placeholders(index: int) -> list[int]:
            return [processor.image_token_id] * int(items[index][NUM_TOKENS].data)

        return [PromptReplacement("image", [self.mark_id(processor)], placeholders)]

    def _maybe_apply_prompt_updates(self, mm_items: MultiModalDataItems, mm_res: Any) -> Any:
        """Raises ValueError, which the client sees, where a text spells out what stands for an image."""
        processor = self.info.get_hf_processor()
        expected, found = mm_items.get_all_counts().get("image", 0), mm_res.prompt_ids.count(self.mark_id(processor))
        if found != expected:
            raise ValueError(
                f"expected {expected} images in the prompt, found {found} places for them: does the text contain "
                f"{image_mark(processor)!r}, or is the chat template not ours?"
            )
        return super()._maybe_apply_prompt_updates(mm_items, mm_res)

    def mark_id(self, processor: Any) -> int:
        """The token that a rendered prompt has once for each image."""
        return processor.tokenizer.convert_tokens_to_ids(image_mark(processor))


def with_images(images: Images) -> Callable[[type], type]:
    """A class decorator: vLLM makes inputs for this model as the family's processor does."""
    return MULTIMODAL_REGISTRY.register_processor(
        ImagesProcessor, info=lambda context: ImagesInfo(context, images), dummy_inputs=DummyImages
    )


def in_dtype(arrays: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Pixels in the model's dtype, in which its encoders would take them anyway."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in arrays.items()}
