"""Chat messages and images in; token ids with one placeholder per visual token and flat patches out.

The tensors and their order are described in the modelling file; messages, texts and padding are those of
`ImageChatProcessor`, pixels those of Valley-Eagle's second encoder.
"""

import re
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..chat_images import CHAT_TEMPLATE, DEFAULT_SYSTEM, ImageChatProcessor
from ..messages import IMAGE_MARK, spread_videos
from ..valley_eagle.configuration import IMAGE_TOKEN
from ..valley_eagle.pixels import qwen2vl_pixels
from .configuration import Valley25Config

IMAGE_START, IMAGE_END = "<im_start>", "<im_end>"
BLACK_IMAGE_SIZE = (3, 3)
MIN_PIXELS = 4 * 28 * 28
MAX_PIXELS = 16384 * 28 * 28
MAX_PIXELS_OF_SEVERAL = 256 * 28 * 28
NUM_VIDEO_FRAMES = 8


class Valley25Processor(ImageChatProcessor):
    """Valley2.5's processor. Keywords of `apply_chat_template` such as `enable_thinking` go to the tokenizer's template.

    Settings, each a keyword of `from_pretrained`, are kept when the processor is saved:

    `max_pixels`: the most pixels the encoder sees of the only image of a text; one visual token is 784 of them. Default:
    `max_pixels` of config.json, else 12,845,056 (16,384 tokens) as in the authors' demo; lower it for training.
    `max_pixels_of_several`: the same for each of several images or the frames of a video, 200,704 (256 tokens) by default.
    `min_pixels`: the fewest, 3,136 by default; smaller images are enlarged.
    `default_system`: the system turn of a conversation that has none, by default `You are a helpful assistant.` as in
    the processor that the family's published code brings; None leaves it to the tokenizer's chat template.
    `text_only_image`: `none` (default) asks text-only questions without an image, `black` puts a black 3 x 3 image in
    front of them as that processor does.
    `num_video_frames`: frames of a video, evenly spaced, 8 by default; each is an image.
    """

    config_class = Valley25Config
    settings = (
        "max_pixels",
        "max_pixels_of_several",
        "min_pixels",
        "default_system",
        "text_only_image",
        "num_video_frames",
    )
    image_inputs = ("pixel_values", "image_grid_thw")

    def __init__(
        self,
        tokenizer: Any = None,
        chat_template: str | None = None,
        *,
        config: Valley25Config | None = None,
        max_pixels: int | None = None,
        max_pixels_of_several: int = MAX_PIXELS_OF_SEVERAL,
        min_pixels: int = MIN_PIXELS,
        default_system: str | None = DEFAULT_SYSTEM,
        text_only_image: str = "none",
        num_video_frames: int = NUM_VIDEO_FRAMES,
    ) -> None:
        config = config or Valley25Config()
        super().__init__(tokenizer, chat_template=chat_template or tokenizer.chat_template or CHAT_TEMPLATE)
        self.geometry = config.geometry()
        self.use_special_start_end_token = config.use_special_start_end_token
        self.max_pixels = max_pixels or config.max_pixels or MAX_PIXELS
        self.max_pixels_of_several = min(max_pixels_of_several, self.max_pixels)
        self.min_pixels = min_pixels
        self.default_system = default_system
        self.text_only_image = text_only_image
        self.num_video_frames = num_video_frames
        self.image_token_id = tokenizer.get_vocab().get(IMAGE_TOKEN, config.image_token_id)
        self.image_token = tokenizer.convert_ids_to_tokens(self.image_token_id)
        self._check()

    def _check(self) -> None:
        if self.text_only_image not in ("none", "black"):
            raise ValueError(f"text_only_image: expected 'none' or 'black', found {self.text_only_image!r}")
        for name in ("max_pixels", "max_pixels_of_several"):
            if not 0 < self.min_pixels <= getattr(self, name):
                raise ValueError(f"expected 0 < min_pixels <= {name}, found {self.min_pixels}, {getattr(self, name)}")
        known = self.tokenizer.get_vocab()
        for token in (IMAGE_START, IMAGE_END) if self.use_special_start_end_token else ():
            if token not in known:
                raise ValueError(f"the tokenizer has no token {token!r}, which use_special_start_end_token asks for")

    def num_image_tokens(self, width: int, height: int, num_images: int = 1) -> int:
        """Visual tokens of one image of this size in pixels, in a text with `num_images` images.

        The two tokens that wrap it are not counted. Raises ValueError for sides that differ by a factor above 200.
        """
        return self.geometry.num_eagle_tokens(width, height, self.min_pixels, self.pixel_limit(num_images))

    def pixel_limit(self, num_images: int) -> int:
        """The most pixels of an image in a text with so many images."""
        return self.max_pixels if num_images == 1 else self.max_pixels_of_several

    def blank_image(self) -> Image.Image | None:
        return Image.new("RGB", BLACK_IMAGE_SIZE) if self.text_only_image == "black" else None

    def _wrap(self, text: str) -> str:
        """Every image mark between its two special tokens, unless it is already."""
        if not self.use_special_start_end_token:
            return text
        return re.sub(f"(?<!{IMAGE_START}){IMAGE_MARK}", IMAGE_START + IMAGE_MARK + IMAGE_END, text)

    def _spread_videos(self, text: str, images: list[Any], videos: list[list[Any]]) -> tuple[str, list[Any], list[Any]]:
        """Frames are images."""
        if not videos:
            return text, images, videos
        return *spread_videos(text, images, videos), []

    def new_pixels(self) -> "_Pixels":
        return _Pixels(self)


class _Pixels:
    """Collects patches and grids of a batch."""

    def __init__(self, processor: Valley25Processor) -> None:
        self.processor = processor
        self.patches: list[np.ndarray] = []
        self.grids: list[tuple[int, int, int]] = []

    def add_image(self, image: Image.Image, num_images: int) -> int:
        processor = self.processor
        limits = {"min_pixels": processor.min_pixels, "max_pixels": processor.pixel_limit(num_images)}
        patches, grid = qwen2vl_pixels(image, processor.geometry, **limits)
        self.patches.append(patches)
        self.grids.append(grid)
        return len(patches) // processor.geometry.eagle_merge**2

    def add_video(self, frames: list[Image.Image]) -> int:
        raise AssertionError("videos become images before")

    def arrays(self) -> dict[str, torch.Tensor]:
        if not self.patches:
            return {}
        return {
            "pixel_values": torch.from_numpy(np.concatenate(self.patches)),
            "image_grid_thw": torch.tensor(self.grids),
        }
