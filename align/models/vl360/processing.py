"""Chat messages and images in; token ids with one placeholder per visual token and flat crops out.

The crops and their order are described in the modelling file; messages,
texts and padding are those of `ImageChatProcessor`.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image

from ..chat_images import ImageChatProcessor
from ..messages import IMAGE_MARK
from ..pixels import centre_crop, normalise, pad_to_square, resize_short_side
from .configuration import IMAGE_TOKEN, QH360VLConfig

# CLIP's mean in bytes, rounded down.
PAD_COLOUR = (122, 116, 104)

# The system text of the original's demo and evaluation.
DEFAULT_SYSTEM = (
    "You are a multilingual, helpful, respectful and honest assistant who can respond in the same language, depending"
    " on the language of the question. Try to be as helpful as possible while still being safe. Your answer should not"
    " contain anything that is false, unhealthy, harmful, immoral, racist, sexist, toxic, dangerous, or illegal, and if"
    " the question relates to such content, please decline to answer. Make sure your answer is socially fair and"
    " positive. If a question doesn't make any sense, or is inconsistent with the facts, explain why instead of"
    " answering the wrong answer. If you don't know the answer to a question, don't share false information."
)

# Llama-3's, used where neither the folder nor its tokenizer brings a template.
CHAT_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)


class QH360VLProcessor(ImageChatProcessor):
    """360VL's processor. A conversation has one image at most, which is how the model was made.

    Settings, each a keyword of `from_pretrained`, kept when saved:

    `default_system`: the system turn of a conversation that has none, by default the long one of the original's demo
    and evaluation; None or an empty text for none.
    `image_aspect_ratio`: `pad` shows the image in the middle of a coloured square, `square` squeezes it into one.
    Default: that of config.json, `pad` in the published folders.
    `single_picture`: the image is one picture of `num_queries` tokens (144 or 576) instead of five crops, which only
    checkpoints without `proj_2: true` can read. Default: `single_picture` of config.json, which training needs too.
    """

    config_class = QH360VLConfig
    settings = ("default_system", "image_aspect_ratio", "single_picture")
    image_inputs = ("pixel_values", "pictures_per_image")
    image_token = IMAGE_MARK
    takes_videos = False

    def __init__(
        self,
        tokenizer: Any = None,
        chat_template: str | None = None,
        *,
        config: QH360VLConfig | None = None,
        default_system: str | None = DEFAULT_SYSTEM,
        image_aspect_ratio: str | None = None,
        single_picture: bool | None = None,
    ) -> None:
        config = config or QH360VLConfig()
        super().__init__(tokenizer, chat_template=chat_template or tokenizer.chat_template or CHAT_TEMPLATE)
        self.default_system = default_system or None
        self.image_aspect_ratio = image_aspect_ratio or config.image_aspect_ratio or "square"
        if self.image_aspect_ratio not in ("pad", "square"):
            raise ValueError(f"image_aspect_ratio: expected pad or square, found {self.image_aspect_ratio!r}")
        known = tokenizer.get_vocab()
        if IMAGE_TOKEN not in known:
            raise ValueError(f"the tokenizer has no token {IMAGE_TOKEN!r}; is it that of Llama 3?")
        # Another id in Llama 3.1's tokenizer than in Llama 3's.
        self.image_token_id = known[IMAGE_TOKEN]
        self.side = config.vision_config.image_size
        self.single_picture = config.single_picture if single_picture is None else single_picture
        if not (config.has_single_projector if self.single_picture else config.has_crop_projectors):
            stated = getattr(config, "proj_2", None)
            raise ValueError(f"single_picture: {self.single_picture} does not go with proj_2: {stated} of config.json")
        self._num_image_tokens = config.tokens_of(single_picture=self.single_picture)

    def num_image_tokens(self, width: int, height: int, num_images: int = 1) -> int:
        """Visual tokens of an image: as many whatever its size."""
        return self._num_image_tokens

    def new_pixels(self) -> "_Pixels":
        """An empty collection of one call's pixels, as the family takes them."""
        return _Pixels(self)

    def _wrap(self, text: str) -> str:
        """The original's placeholder is understood too."""
        return text.replace(IMAGE_TOKEN, IMAGE_MARK)


class _Pixels:
    """Collects the crops of a batch."""

    def __init__(self, processor: QH360VLProcessor) -> None:
        self.processor = processor
        self.crops: list[np.ndarray] = []

    def add_image(self, image: Image.Image, num_images: int) -> int:
        if num_images > 1:
            raise ValueError(f"360VL takes one image a conversation, found {num_images}")
        pad = self.processor.image_aspect_ratio == "pad"
        side = self.processor.side
        pictures = (
            [one_picture(image, side, pad=pad)] if self.processor.single_picture else five_crops(image, side, pad=pad)
        )
        self.crops.append(np.stack(pictures))
        return self.processor.num_image_tokens(*image.size)

    def add_video(self, frames: list[Image.Image]) -> int:
        raise ValueError("360VL takes images, not videos")

    def arrays(self) -> dict[str, torch.Tensor]:
        if not self.crops:
            return {}
        return {
            "pixel_values": torch.from_numpy(np.concatenate(self.crops)),
            "pictures_per_image": torch.tensor([len(pictures) for pictures in self.crops]),
        }


def five_crops(image: Image.Image, side: int, *, pad: bool) -> list[np.ndarray]:
    """The four quarters of the image, scaled to twice `side`, and the whole of it at `side`; `(3, side,
    side)` float32 each."""
    squared = pad_to_square(image, PAD_COLOUR) if pad else image
    large = squared.resize((2 * side, 2 * side), Image.Resampling.BICUBIC)
    corners = [(left, top) for top in (0, side) for left in (0, side)]
    quarters = [large.crop((left, top, left + side, top + side)) for left, top in corners]
    whole = centre_crop(resize_short_side(large, side, Image.Resampling.BICUBIC), side)
    return [normalise(picture) for picture in (*quarters, whole)]


def one_picture(image: Image.Image, side: int, *, pad: bool) -> np.ndarray:
    """The image as CLIP's own preprocessing makes it, `(3, side, side)` float32: short side `side`, middle square."""
    squared = pad_to_square(image, PAD_COLOUR) if pad else image
    return normalise(centre_crop(resize_short_side(squared, side, Image.Resampling.BICUBIC), side))
