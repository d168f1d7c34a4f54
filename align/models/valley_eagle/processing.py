"""Chat messages and images in, token ids with one placeholder per visual token and flat image tensors out.

The image tensors and their order are described in the modelling file; messages, texts and padding are those of
`ImageChatProcessor`. Where the original's entry points disagree the choice is a keyword of `from_pretrained` (so of
`AutoProcessor.from_pretrained`); see `ValleyProcessor`.
"""

import re
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..chat_images import CHAT_TEMPLATE, DEFAULT_SYSTEM, ImageChatProcessor, frames_of
from ..messages import IMAGE_MARK, spread_videos
from ..open_image import as_frame, is_frame
from .configuration import IMAGE_TOKEN, ValleyEagleConfig
from .pixels import cut_tiles, qwen2vl_pixels, siglip_pixels
from .tiles import Geometry

IMAGE_START, IMAGE_END = "<im_start>", "<im_end>"
BLACK_IMAGE_SIZE = (3, 3)
MIN_PIXELS = 56 * 56
NUM_VIDEO_FRAMES = 8


class ValleyProcessor(ImageChatProcessor):
    """Valley-Eagle's processor.

    Settings, each a keyword of `from_pretrained`, are kept when the processor is saved:

    `max_pixels`: the most pixels the Qwen2-VL encoder sees of an image. Default: `max_pixels` of config.json, 571,536 in
    the published folders, which is what the model was trained with and bounds an image to 2,689 tokens. The published
    processor's own default is 12,845,056 (16,384 tokens from this encoder alone), its chat class's 1,003,520.
    `min_pixels`: the fewest, 3,136 by default; smaller images are enlarged.
    `default_system`: the system turn of a conversation that has none, by default `You are a helpful assistant.` as in
    the published processor; None leaves it to the tokenizer's chat template (`You are Qwen, created by Alibaba Cloud. ...`),
    which is what the training code did.
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
        super().__init__(tokenizer, chat_template=chat_template or tokenizer.chat_template or CHAT_TEMPLATE)
        self.geometry: Geometry = config.geometry()
        self.use_special_start_end_token = config.use_special_start_end_token
        self.max_pixels = config.max_pixels if max_pixels is None else max_pixels
        self.min_pixels = min_pixels
        self.frame_max_pixels = config.frame_max_pixels if frame_max_pixels is None else frame_max_pixels
        self.num_video_frames = num_video_frames
        self.default_system = default_system
        self.text_only_image = text_only_image
        self.image_token_id = _image_token_id(tokenizer, config)
        self.image_token = tokenizer.convert_ids_to_tokens(self.image_token_id)
        self._check()

    def _check(self) -> None:
        if self.text_only_image not in ("none", "black"):
            raise ValueError(f"text_only_image: expected 'none' or 'black', found {self.text_only_image!r}")
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ValueError(f"expected 0 < min_pixels <= max_pixels, found {self.min_pixels} and {self.max_pixels}")
        if self.use_special_start_end_token:
            for token in (IMAGE_START, IMAGE_END):
                if len(self.tokenizer(token, add_special_tokens=False)["input_ids"]) != 1:
                    raise ValueError(
                        f"the tokenizer has no token {token!r}, which use_special_start_end_token asks for"
                    )

    @property
    def model_input_names(self) -> list[str]:
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
        return _Pixels(self)

    def blank_image(self) -> Image.Image | None:
        return Image.new("RGB", BLACK_IMAGE_SIZE) if self.text_only_image == "black" else None

    def _spread_videos(self, text: str, images: list[Any], videos: list[list[Any]]) -> tuple[str, list[Any], list[Any]]:
        """Frames are images."""
        if not videos:
            return text, images, videos
        return *spread_videos(text, images, [[as_frame(frame) for frame in frames_of(video)] for video in videos]), []

    def _wrap(self, text: str) -> str:
        """Every image mark between its two special tokens, unless it is already."""
        if not self.use_special_start_end_token:
            return text
        return re.sub(f"(?<!{IMAGE_START}){IMAGE_MARK}", IMAGE_START + IMAGE_MARK + IMAGE_END, text)


class _Pixels:
    """Collects the image arrays of a batch."""

    def __init__(self, processor: ValleyProcessor) -> None:
        self.processor = processor
        self.tiles: list[np.ndarray] = []
        self.sizes: list[tuple[int, int]] = []
        self.patches: list[np.ndarray] = []
        self.grids: list[tuple[int, int, int]] = []

    def add_image(self, image: Image.Image, num_images: int) -> int:
        geometry = self.processor.geometry
        tiled = geometry.is_tiled(num_images)
        self.tiles.append(siglip_pixels(cut_tiles(image, geometry, tiled=tiled)))
        self.sizes.append(image.size)
        num_tokens = geometry.num_tile_tokens(*image.size, tiled=tiled)
        if not geometry.eagle:
            return num_tokens
        limits = {"min_pixels": self.processor.min_pixels, "max_pixels": self.processor.pixel_limit(image)}
        patches, grid = qwen2vl_pixels(image, geometry, **limits)
        self.patches.append(patches)
        self.grids.append(grid)
        return num_tokens + len(patches) // geometry.eagle_merge**2

    def add_video(self, frames: list[Image.Image]) -> int:
        raise AssertionError("videos become images before")

    def arrays(self) -> dict[str, torch.Tensor]:
        if not self.tiles:
            return {}
        data = {
            "pixel_values": torch.from_numpy(np.concatenate(self.tiles)),
            "tiles_per_image": torch.tensor([len(tiles) for tiles in self.tiles]),
            "image_sizes": torch.tensor(self.sizes),
        }
        if self.patches:
            data["eagle_pixel_values"] = torch.from_numpy(np.concatenate(self.patches))
            data["image_grid_thw"] = torch.tensor(self.grids)
        return data


def _image_token_id(tokenizer: Any, config: ValleyEagleConfig) -> int:
    """The placeholder's id: the tokenizer's `<|image_pad|>` where it has one, else what config.json says."""
    known = tokenizer.get_vocab()
    if IMAGE_TOKEN in known:
        return known[IMAGE_TOKEN]
    if config.image_token_id is None or config.image_token_id >= len(tokenizer):
        raise ValueError(f"the tokenizer has no token {IMAGE_TOKEN!r}; name another as image_token_id in config.json")
    return config.image_token_id
