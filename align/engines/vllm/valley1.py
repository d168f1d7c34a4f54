"""Valley 1 and Chinese-Valley for vLLM: pictures through CLIP, pooled over all of a prompt, vLLM's Llama.

All pictures of a prompt are the frames of one image: 256 visual tokens that they have in common, then one for each.
vLLM has an item per picture. The first item holds all pictures and stands for the common tokens and its own one; every
other holds itself. What the first becomes depends on the others, so every item's key in the cache is made of all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import BatchFeature
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import PromptReplacement, PromptUpdateDetails

from align.engines.vllm.images import DummyImages, Images, ImagesInfo, ImagesProcessor, in_dtype
from align.engines.vllm.model import VisualModel
from align.models.open_image import open_image

IS_FIRST = "is_first"


class PicturesInfo(ImagesInfo):
    """The most tokens: those of a prompt's first picture."""

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """The most tokens of one image (vLLM profiles memory with it)."""
        return {"image": self.get_hf_processor().num_patches + 5}


class DummyPictures(DummyImages):
    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """A prompt of so many images (vLLM profiles memory with it)."""
        count = mm_counts.get("image", 0)
        frames = "<vi_frame>" * count
        return f"<im_start><im_patch><im_end><vi_start>{frames}<vi_end>" if count else ""


class PicturesProcessor(ImagesProcessor):
    """Pictures to tensors; one item per picture."""

    def _get_mm_hashes(self, inputs: Any) -> Any:
        hashes = super()._get_mm_hashes(inputs)
        together = "".join(hashes.get("image", []))
        return {
            **hashes,
            "image": [hashlib.sha256(f"{one} {together}".encode()).hexdigest() for one in hashes.get("image", [])],
        }

    def _cached_apply_hf_processor(self, inputs: Any, timing_ctx: Any) -> Any:
        # The cache would ask for the tensors of single items.
        return self._apply_hf_processor(inputs, timing_ctx)

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]) -> BatchFeature:
        pictures = [open_image(picture) for picture in hf_data["images"]]
        pixels = self.info.get_hf_processor(**hf_kwargs).new_pixels()
        pixels.add(pictures)
        others = [1] * (len(pictures) - 1)
        return BatchFeature(
            {
                **in_dtype(pixels.arrays(), self.info.ctx.model_config.dtype),
                "pictures_per_image": torch.tensor([len(pictures), *others]),
                IS_FIRST: torch.tensor([1] + [0] * len(others)),
            }
        )

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        if not hf_inputs:
            return {}
        count = len(hf_inputs[IS_FIRST])
        slices = [slice(0, count), *(slice(index, index + 1) for index in range(1, count))]
        batched = {name: MultiModalFieldConfig.batched("image") for name in ("pictures_per_image", IS_FIRST)}
        return {"pixel_values": MultiModalFieldConfig.flat("image", slices), **batched}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        processor = self.info.get_hf_processor(**hf_processor_mm_kwargs)
        patch, frame = processor.image_token_id, processor.video_token_id
        between = processor.tokenizer.convert_tokens_to_ids(["<im_end>", "<vi_start>"])

        def target(index: int) -> list[int]:
            return [frame] if index else [patch, *between, frame]

        def placeholders(index: int) -> PromptUpdateDetails:
            tokens = [frame] if index else [patch] * processor.num_patches + [*between, frame]
            return PromptUpdateDetails.select_token_ids(tokens, [patch, frame])

        return [PromptReplacement("image", target, placeholders)]

    def mark_id(self, processor: Any) -> int:
        """The token that stands for a picture."""
        return processor.video_token_id


class ValleyLlama(VisualModel):
    """`architectures: ["ValleyLlamaForCausalLM"]` and `["LlavaLlamaForCausalLM"]`."""

    text_architecture = "LlamaForCausalLM"

    def placeholder_ids(self) -> list[int]:
        """The ids of the tokens that images stand in for."""
        return [self.config.image_token_id, self.config.video_token_id]

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """For the first picture of a prompt the common tokens and its own, for every other its own."""
        num_common = self.config.num_patches
        features = super().embed_multimodal(**kwargs)
        return [
            tokens[: num_common + 1] if is_first else tokens[num_common:]
            for tokens, is_first in zip(features, torch.as_tensor(kwargs.get(IS_FIRST, ())).tolist(), strict=True)
        ]


MULTIMODAL_REGISTRY.register_processor(
    PicturesProcessor,
    info=lambda context: PicturesInfo(
        context, Images(flat={}, sizes_px=lambda processor: [(processor.side, processor.side)])
    ),
    dummy_inputs=DummyPictures,
)(ValleyLlama)
