"""Chat messages and images in; token ids with one placeholder per visual token and flat patches out.

The tensors and their order are described in the modelling file; messages, texts and padding are those of
`ImageChatProcessor`, pixels those of Valley-Eagle's second encoder.
"""

from typing import Any

import torch
from PIL import Image

from ..chat_images import DEFAULT_SYSTEM
from ..qwen2vl import PatchBatch
from ..valley_chat import MIN_PIXELS, NUM_VIDEO_FRAMES, ValleyChatProcessor
from .configuration import Valley25Config

MAX_PIXELS = 16384 * 28 * 28
MAX_PIXELS_OF_SEVERAL = 256 * 28 * 28


class Valley25Processor(ValleyChatProcessor):
    """Valley2.5's processor. Keywords of `apply_chat_template` such as `enable_thinking`
    go to the tokenizer's template.

    Settings, each a keyword of `from_pretrained`, are kept when the processor is saved:

    `max_pixels`: the most pixels the encoder sees of the only image of a text; one visual token is 784 of them.
    Default: `max_pixels` of config.json, else 12,845,056 (16,384 tokens) as in the authors' demo;
    lower it for training.
    `max_pixels_of_several`: the same for each of several images or the frames of a video, 200,704 (256 tokens)
    by default.
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
    # Those of Valley-Eagle's tiles have no effect here.
    published_keywords = (
        "only_navit",
        "anyres",
        "grid_pinpoints",
        "only_crop_single_image",
        "use_special_start_end_token",
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
        super().__init__(
            tokenizer,
            chat_template,
            config=config,
            min_pixels=min_pixels,
            default_system=default_system,
            text_only_image=text_only_image,
            num_video_frames=num_video_frames,
        )
        self.geometry = config.geometry()
        self.max_pixels = max_pixels or config.max_pixels or MAX_PIXELS
        self.max_pixels_of_several = min(max_pixels_of_several, self.max_pixels)
        self._check_limit("max_pixels")
        self._check_limit("max_pixels_of_several")

    def num_image_tokens(self, width: int, height: int, num_images: int = 1) -> int:
        """Visual tokens of one image of this size in pixels, in a text with `num_images` images.

        The two tokens that wrap it are not counted. Raises ValueError for sides that differ by a factor above 200.
        """
        return self.geometry.num_tokens(width, height, self.min_pixels, self.pixel_limit(num_images))

    def pixel_limit(self, num_images: int) -> int:
        """The most pixels of an image in a text with so many images."""
        return self.max_pixels if num_images == 1 else self.max_pixels_of_several

    def new_pixels(self) -> "_Pixels":
        """An empty collection of one call's pixels, as the family takes them."""
        return _Pixels(self)


class _Pixels:
    """Collects patches and grids of a batch."""

    def __init__(self, processor: Valley25Processor) -> None:
        self.processor = processor
        self.patches = PatchBatch(processor.geometry)

    def add_image(self, image: Image.Image, num_images: int) -> int:
        limits = {"min_pixels": self.processor.min_pixels, "max_pixels": self.processor.pixel_limit(num_images)}
        return self.patches.add(image, **limits)

    def add_video(self, frames: list[Image.Image]) -> int:
        raise AssertionError("videos become images before")

    def arrays(self) -> dict[str, torch.Tensor]:
        return self.patches.arrays("pixel_values")
