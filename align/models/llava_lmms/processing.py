"""Chat messages, images and videos in; token ids with one placeholder per visual token and flat image tensors out.

The tensors and their order are described in the modelling file; messages, texts and padding are those of
`ImageChatProcessor`. Resizing is PIL's, as in the original.
"""

import re
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..chat_images import CHAT_TEMPLATE, DEFAULT_SYSTEM, ImageChatProcessor
from ..messages import IMAGE_MARK, VIDEO_MARK
from ..open_image import is_frame
from ..pixels import pad_to_square
from ..valley_eagle.pixels import cut_tiles, siglip_pixels
from ..valley_eagle.tiles import parse_canvases
from .configuration import LlavaQwenConfig
from .layout import ImageLayout, Tiling

# The mean of SigLIP's normalisation in bytes, as the original computes it.
PAD_COLOUR = (127, 127, 127)
NUM_VIDEO_FRAMES = 16


class LlavaQwenProcessor(ImageChatProcessor):
    """LLaVA-OneVision's processor, for folders in the format of lmms-lab.

    Settings, each a keyword of `from_pretrained`, are kept when the processor is saved:

    `image_aspect_ratio`: `anyres_max_N` tiles every image on the canvas that suits it, also where there are several,
    and makes maps of tokens larger than N tiles smaller; `pad` shows every image once, as a square with grey margins,
    which is what the authors' tutorial sets for several images. Default: that of config.json, `anyres_max_9`.
    `image_grid_pinpoints`: canvases, as pixel pairs or like "(1x1),...,(2x2)". Default: those of config.json, up to 6 x
    6 tiles (7,371 tokens for an image); fewer make long prompts shorter, but are not what the model was trained with.
    `default_system`: the system turn of a conversation that has none; None leaves it to the tokenizer's chat template.
    `num_video_frames`: frames of a video, evenly spaced, 16 by default.
    """

    config_class = LlavaQwenConfig
    settings = ("image_aspect_ratio", "image_grid_pinpoints", "default_system", "num_video_frames")
    image_inputs = ("pixel_values", "image_layouts")
    image_token = IMAGE_MARK

    def __init__(
        self,
        tokenizer: Any = None,
        chat_template: str | None = None,
        *,
        config: LlavaQwenConfig | None = None,
        image_aspect_ratio: str | None = None,
        image_grid_pinpoints: str | list | None = None,
        default_system: str | None = DEFAULT_SYSTEM,
        num_video_frames: int = NUM_VIDEO_FRAMES,
    ) -> None:
        config = config or LlavaQwenConfig()
        super().__init__(tokenizer, chat_template=chat_template or tokenizer.chat_template or CHAT_TEMPLATE)
        self.image_aspect_ratio = image_aspect_ratio or config.image_aspect_ratio
        self.image_grid_pinpoints = image_grid_pinpoints or config.image_grid_pinpoints
        self.default_system = default_system
        self.num_video_frames = num_video_frames
        self.image_token_id = config.image_token_id
        self.video_stride = config.mm_spatial_pool_stride
        edge = config.vision_config.image_size
        self.tiling = Tiling(
            canvases=parse_canvases(self.image_grid_pinpoints, edge),
            edge_px=edge,
            side=config.patches_per_side,
            max_tiles=_max_tiles(self.image_aspect_ratio),
        )

    def image_layout(self, width: int, height: int) -> ImageLayout:
        """What becomes of an image of this size in pixels."""
        return ImageLayout() if self.image_aspect_ratio == "pad" else self.tiling.layout(width, height)

    def num_image_tokens(self, width: int, height: int, num_images: int = 1) -> int:
        """Visual tokens of one image of this size in pixels; how many images the text has changes nothing here."""
        return self.image_layout(width, height).num_tokens(self.tiling.side)

    def _spread_videos(self, text: str, images: list[Any], videos: list[list[Any]]) -> tuple[str, list[Any], list[Any]]:
        """Images that are known as frames and stand side by side are a video."""
        if videos or not any(is_frame(image) for image in images):
            return text, images, videos
        return gather_frames(text, images)

    def new_pixels(self) -> "_Pixels":
        """An empty collection of one call's pixels, as the family takes them."""
        return _Pixels(self)


def gather_frames(text: str, images: list[Any]) -> tuple[str, list[Any], list[Any]]:
    """A text in which a video's mark stands for the marks of its frames; its other images, and its videos.

    Frames with nothing or a space between them are one video.
    Raises ValueError where marks and images differ in number.
    """
    pieces = text.split(IMAGE_MARK)
    if len(pieces) != len(images) + 1:
        raise ValueError(f"expected {len(pieces) - 1} images, as many as the text names, found {len(images)}")
    gathered = ""
    stills: list[Any] = []
    videos: list[list[Any]] = []
    continues = False
    for before, image in zip(pieces, images, strict=False):
        if not is_frame(image):
            gathered += before + IMAGE_MARK
            stills.append(image)
            continues = False
        elif continues and not before.strip(" "):
            videos[-1].append(image)
        else:
            gathered += before + VIDEO_MARK
            videos.append([image])
            continues = True
    return gathered + pieces[-1], stills, videos


class _Pixels:
    """Collects views and layouts of a batch."""

    def __init__(self, processor: LlavaQwenProcessor) -> None:
        self.processor = processor
        self.views: list[np.ndarray] = []
        self.layouts: list[ImageLayout] = []

    def add_image(self, image: Image.Image, num_images: int) -> int:
        tiling = self.processor.tiling
        if self.processor.image_aspect_ratio == "pad":
            views = [_fill(pad_to_square(image, PAD_COLOUR), tiling.edge_px)]
        else:
            views = cut_tiles(image, tiling, tiled=True)
        return self._add(views, self.processor.image_layout(*image.size))

    def add_video(self, frames: list[Image.Image]) -> int:
        tiling = self.processor.tiling
        views = [_fill(frame, tiling.edge_px) for frame in frames]
        return self._add(views, tiling.video_layout(len(frames), self.processor.video_stride))

    def _add(self, views: list[Image.Image], layout: ImageLayout) -> int:
        assert len(views) == layout.num_views
        self.views.append(siglip_pixels(views))
        self.layouts.append(layout)
        return layout.num_tokens(self.processor.tiling.side)

    def arrays(self) -> dict[str, torch.Tensor]:
        if not self.views:
            return {}
        layouts = torch.tensor([layout.as_row() for layout in self.layouts])
        return {"pixel_values": torch.from_numpy(np.concatenate(self.views)), "image_layouts": layouts}


def _max_tiles(aspect_ratio: str) -> int | None:
    """The N of `anyres_max_N`; None where maps are left as they are."""
    found = re.fullmatch(r"anyres_max_(\d+)", aspect_ratio)
    if found is None and aspect_ratio not in ("anyres", "pad"):
        raise ValueError(f"image_aspect_ratio: expected pad, anyres or anyres_max_N, found {aspect_ratio!r}")
    return int(found.group(1)) if found else None


def _fill(image: Image.Image, edge: int) -> Image.Image:
    """The whole image squeezed into one square."""
    return image.resize((edge, edge), Image.Resampling.BICUBIC)
