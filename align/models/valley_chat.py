"""What the processors of ByteDance's Valley2 line share: marks between two tokens, black images, videos as images."""

import re
from typing import Any

from PIL import Image

from .chat_images import CHAT_TEMPLATE, ImageChatProcessor, frames_of
from .messages import IMAGE_MARK, spread_videos
from .open_image import as_frame

IMAGE_TOKEN = "<|image_pad|>"
PUBLISHED_IMAGE_TOKEN_ID = 151655
IMAGE_START, IMAGE_END = "<im_start>", "<im_end>"
BLACK_IMAGE_SIZE = (3, 3)
MIN_PIXELS = 4 * 28 * 28
NUM_VIDEO_FRAMES = 8


class ValleyChatProcessor(ImageChatProcessor):
    """Base of both families' processors; what its settings mean is documented there."""

    def __init__(
        self,
        tokenizer: Any,
        chat_template: str | None,
        *,
        config: Any,
        min_pixels: int,
        default_system: str | None,
        text_only_image: str,
        num_video_frames: int,
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template or tokenizer.chat_template or CHAT_TEMPLATE)
        self.use_special_start_end_token = config.use_special_start_end_token
        self.min_pixels = min_pixels
        self.default_system = default_system
        self.text_only_image = text_only_image
        self.num_video_frames = num_video_frames
        self.image_token_id = _image_token_id(tokenizer, config)
        self.image_token = tokenizer.convert_ids_to_tokens(self.image_token_id)
        if text_only_image not in ("none", "black"):
            raise ValueError(f"text_only_image: expected 'none' or 'black', found {text_only_image!r}")
        if self.use_special_start_end_token:
            self._check_wrappers()

    def _check_wrappers(self) -> None:
        known = self.tokenizer.get_vocab()
        for token in (IMAGE_START, IMAGE_END):
            if self.tokenizer(token, add_special_tokens=False)["input_ids"] != [known.get(token)]:
                raise ValueError(f"the tokenizer has no token {token!r}, which use_special_start_end_token asks for")

    def _check_limit(self, name: str) -> None:
        """Raises ValueError where the most pixels, the setting `name`, are fewer than the fewest."""
        most = getattr(self, name)
        if not 0 < self.min_pixels <= most:
            raise ValueError(f"expected 0 < min_pixels <= {name}, found {self.min_pixels} and {most}")

    def blank_image(self) -> Image.Image | None:
        """What a family shows where there is no image; None: nothing."""
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
        return *spread_videos(text, images, [[as_frame(frame) for frame in frames_of(video)] for video in videos]), []


def _image_token_id(tokenizer: Any, config: Any) -> int:
    """The placeholder's id: the tokenizer's `<|image_pad|>` where it has one, else what config.json says."""
    known = tokenizer.get_vocab()
    if IMAGE_TOKEN in known:
        return known[IMAGE_TOKEN]
    if config.image_token_id is None or config.image_token_id >= len(tokenizer):
        raise ValueError(f"the tokenizer has no token {IMAGE_TOKEN!r}; name another as image_token_id in config.json")
    return config.image_token_id
