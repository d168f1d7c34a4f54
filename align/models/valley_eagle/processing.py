"""Chat messages and images in, token ids with one placeholder per visual token and flat image tensors out.

The image tensors and their order are described in the modelling file; messages, texts and padding are those of
`ImageChatProcessor`. Where the original's entry points disagree the choice is a keyword of `from_pretrained` (so of
`AutoProcessor.from_pretrained`); see `ValleyProcessor`.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image

from ..chat_images import DEFAULT_SYSTEM
from ..open_image import is_frame
from ..qwen2vl import PatchBatch
from ..valley_chat import MIN_PIXELS, NUM_VIDEO_FRAMES, ValleyChatProcessor
from .configuration import ValleyEagleConfig
from .pixels import cut_tiles, siglip_pixels


class ValleyProcessor(ValleyChatProcessor):
    """Valley-Eagle's processor.

    Settings, each a keyword of `from_pretrained`, are kept when the processor is saved:

    `max_pixels`: the most pixels the Qwen2-VL encoder sees of an image. Default: `max_pixels` of config.json, 571,536
    in the published folders, which is what the model was trained with and bounds an image to 2,689 tokens. The
    published processor's own default is 12,845,056 (16,384 tokens from this encoder alone), its chat class's 1,003,520.
    `min_pixels`: the fewest, 3,136 by default; smaller images are enlarged.
    `default_system`: the system turn of a conversation that has none, by default `You are a helpful assistant.` as in
    the published processor; None leaves it to the tokenizer's chat template (`You are Qwen, created by Alibaba Cloud.
    ...`), which is what the training code did.
    `frame_max_pixels`: the same as `max_pixels` for the frames of a video. Default: `frame_max_pixels` of config.json.
    `num_video_frames`: frames of a video, evenly spaced, 8 by default; each is an image of its own, untiled.
    `text_only_image`: `none` (default) asks text-only questions without an image, `black` puts a black 3 x 3 image in
    front of them as the published processor does.
    """

    config_class = ValleyEagleConfig
    settings = (
        "max_pixels",
        "min_pixels",
        "frame_max_pixels",
        "num_video_frames",
        "default_system",
        "text_only_image",
    )
    published_keywords = (
        "only_navit",
        "anyres",
        "grid_pinpoints",
        "only_crop_single_image",
        "use_special_start_end_token",
    )
    settings_file = "valley_processor.json"

    def __init__(
        self,
        tokenizer: Any = None,
        chat_template: str | None = None,
        *,
        config: ValleyEagleConfig | None = None,
        max_pixels: int | None = None,
        min_pixels: int = MIN_PIXELS,
        frame_max_pixels: int | None = None,
        num_video_frames: int = NUM_VIDEO_FRAMES,
        default_system: str | None = DEFAULT_SYSTEM,
        text_only_image: str = "none",
    ) -> None:
        config = config or ValleyEagleConfig()
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
        self.max_pixels = config.max_pixels if max_pixels is None else max_pixels
        self.frame_max_pixels = config.frame_max_pixels if frame_max_pixels is None else frame_max_pixels
        self._check_limit("max_pixels")

    @property
    def model_input_names(self) -> list[str]:
        """The names of everything that the model takes."""
        names = ["input_ids", "attention_mask", "pixel_values", "tiles_per_image", "image_sizes"]
        return [*names, "eagle_pixel_values", "image_grid_thw"] if self.geometry.eagle else names

    def num_image_tokens(self, width: int, height: int, num_images: int = 1) -> int:
        """Visual tokens of one image of this size in pixels, in a sample with `num_images` images.

        The two tokens that wrap it are not counted. Raises ValueError for sides that differ by a factor above 200.
        """
        tiled = self.geometry.is_tiled(num_images)
        tile_tokens = self.geometry.num_tile_tokens(width, height, tiled=tiled)
        return tile_tokens + self.geometry.num_eagle_tokens(width, height, self.min_pixels, self.max_pixels)

    def pixel_limit(self, image: Image.Image) -> int:
        """The most pixels that the Qwen2-VL encoder sees of this image."""
        return min(self.max_pixels, self.frame_max_pixels) if is_frame(image) else self.max_pixels

    def new_pixels(self) -> "_Pixels":
        """An empty collection of one call's pixels, as the family takes them."""
        return _Pixels(self)


class _Pixels:
    """Collects the image arrays of a batch."""

    def __init__(self, processor: ValleyProcessor) -> None:
        self.processor = processor
        self.tiles: list[np.ndarray] = []
        self.sizes: list[tuple[int, int]] = []
        eagle = processor.geometry.eagle
        self.patches = PatchBatch(eagle) if eagle else None

    def add_image(self, image: Image.Image, num_images: int) -> int:
        geometry = self.processor.geometry
        tiled = geometry.is_tiled(num_images)
        self.tiles.append(siglip_pixels(cut_tiles(image, geometry, tiled=tiled)))
        self.sizes.append(image.size)
        num_tokens = geometry.num_tile_tokens(*image.size, tiled=tiled)
        if self.patches is None:
            return num_tokens
        limits = {"min_pixels": self.processor.min_pixels, "max_pixels": self.processor.pixel_limit(image)}
        return num_tokens + self.patches.add(image, **limits)

    def add_video(self, frames: list[Image.Image]) -> int:
        raise AssertionError("videos become images before")

    def arrays(self) -> dict[str, torch.Tensor]:
        if not self.tiles:
            return {}
        return {
            "pixel_values": torch.from_numpy(np.concatenate(self.tiles)),
            "tiles_per_image": torch.tensor([len(tiles) for tiles in self.tiles]),
            "image_sizes": torch.tensor(self.sizes),
            **(self.patches.arrays("eagle_pixel_values") if self.patches else {}),
        }
