"""Chat messages and pictures in; token ids with one placeholder per visual token and flat pixels out.

All pictures of a text are the frames of one image: 256 `<im_patch>` for what they have in common and a `<vi_frame>` for
each. A rendered text names each of these tokens once, between the four that wrap them; `<image>` and `<video>` in a
text stand for all six. Where a text names its image twice it is shown twice, as in the original.

Prompts are those of github.com/RupertLuo/Valley; its training and its demo disagree, so which is meant is a setting.
"""

import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature

from ..chat_images import ImageChatProcessor, frames_of
from ..messages import IMAGE_MARK, PART_KINDS, VIDEO_MARK, parts_of, source_of
from ..open_image import FRAME_KEY, as_frame, open_image
from ..pixels import centre_crop, normalise, resize_short_side
from .configuration import FRAME_TOKEN, PATCH_TOKEN, ValleyLlamaConfig

WRAPPERS = ("<im_start>", "<im_end>", "<vi_start>", "<vi_end>")
MARK = f"<im_start>{PATCH_TOKEN}<im_end><vi_start>{FRAME_TOKEN}<vi_end>"
NUM_VIDEO_FRAMES = 8
# The original scales the frames of a video file to 256 pixels before it crops 224.
FRAME_MARGIN = 256 / 224
TURN = "###"

SYSTEMS = {
    # How the original's training texts begin (conversation "v1").
    "v1": (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions."
    ),
    # Its default for videos; the missing spaces are the original's.
    "multimodal_video": (
        "You are Valley, a large language and vision assistant trained by ByteDance.You are able to understand the"
        " visual content or video that the user provides, and assist the user with a variety of tasks using natural"
        " language.Follow the instructions carefully and explain your answers in detail."
    ),
    # The same as the demo writes it.
    "demo": (
        "You are Valley, a large language and vision assistant trained by ByteDance. You are able to understand the"
        " visual content or video that the user provides, and assist the user with a variety of tasks using natural"
        " language. Follow the instructions carefully and explain your answers in detail."
    ),
    "chinese": (
        "你是大型语言视觉助手 Chinese-Valley。你能够理解用户提供的视觉内容或视频，并使用自然语言协助用户完成各种任务。"
        "请仔细按照人类的指令进行回答，并详细解释你的答案。"
    ),
}

_SYSTEM = "{{ bos_token }}{% for m in messages if m.role == 'system' %}{{ m.content + '\\n\\n' }}{% endfor %}"
TEMPLATES = {
    "training": (
        _SYSTEM + "{% for m in messages if m.role != 'system' %}"
        "{% if m.role == 'user' %}{{ '### Human: ' + m.content + '\\n' }}"
        "{% elif loop.last %}{{ '### Assistant:' + reply_gap + m.content + '\\n###' }}"
        "{% else %}{{ '### Assistant: ' + m.content + '\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Assistant:' }}{% endif %}"
    ),
    "original_training": (
        _SYSTEM
        + "{% for m in messages if m.role != 'system' %}{{ '### ' + ('Human' if m.role == 'user' else 'Assistant') + ':"
        " ' + m.content + '\\n' }}{% endfor %}{{ '### ' }}"
    ),
    "original_demo": (
        _SYSTEM + "{{ '###' }}{% for m in messages if m.role != 'system' %}"
        "{% if m.role == 'assistant' %}{{ ' Assistent: ' + m.content + ' \\n###' }}"
        "{% elif '<im_start>' in m.content %}{{ ' Human: ' + m.content + ' \\n###' }}{% endif %}{% endfor %}"
    ),
}


class ValleyLlamaProcessor(ImageChatProcessor):
    """The processor of Valley 1 and Chinese-Valley.

    Settings, each a keyword of `from_pretrained`, kept when saved:

    `prompt_style`: `training` (default) is the text that the model was trained on, up to and with `### Assistant:`
    where an answer is wanted, and `###` behind an answer. The others reproduce the original to the letter:
    `original_training` always ends with `### `, so that the model writes `Assistant:` itself; `original_demo` is how
    its demo asks, where the word is misspelt `Assistent` and user turns without an image are left out.
    `default_system`: the system text of a conversation that has none: one of `v1`, `multimodal_video`, `demo`,
    `chinese`, or a text of one's own; None or an empty text for none. Default: `chinese` for Chinese-Valley,
    else `multimodal_video`.
    `num_video_frames`: frames of a video, evenly spaced, 8 by default.
    `strip_around_images`: drop spaces and line breaks beside the image tokens. Default: true for a folder with a
    `tokenizer.model` alone, because the tokenizer that the original opened it with did so (LlamaTokenizer of
    transformers 4.28), else false.

    A response ends with `###` (`stop_strings`), which no end token stands for; `clean_response` takes away what the
    original's demo takes away.
    """

    config_class = ValleyLlamaConfig
    settings = ("prompt_style", "default_system", "num_video_frames", "strip_around_images")
    image_inputs = ("pixel_values", "pictures_per_image")
    stop_strings = (TURN,)

    def __init__(
        self,
        tokenizer: Any = None,
        chat_template: str | None = None,
        *,
        config: ValleyLlamaConfig | None = None,
        prompt_style: str = "training",
        default_system: str | None = "auto",
        num_video_frames: int = NUM_VIDEO_FRAMES,
        strip_around_images: bool = False,
    ) -> None:
        config = config or ValleyLlamaConfig()
        if prompt_style not in TEMPLATES:
            raise ValueError(f"prompt_style: expected one of {', '.join(TEMPLATES)}, found {prompt_style!r}")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.unk_token
        super().__init__(tokenizer, chat_template=chat_template or TEMPLATES[prompt_style])
        if default_system == "auto":
            default_system = "chinese" if config.is_chinese else "multimodal_video"
        self.prompt_style = prompt_style
        self.default_system = SYSTEMS.get(default_system, default_system) if default_system else None
        self.num_video_frames = num_video_frames
        self.strip_around_images = strip_around_images
        self.side = config.vision_config.image_size
        self.num_patches = config.num_patches
        self.image_token, self.video_token = PATCH_TOKEN, FRAME_TOKEN
        self.image_token_id, self.video_token_id = _token_ids(tokenizer)
        # Llama's tokenizer begins every text with a space of its own;
        # in front of a response ours would be a second one.
        self.writes_gap = tokenizer.tokenize("A", add_special_tokens=False)[0].startswith("\u2581")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """As in the base. Raises ValueError too where the tokenizer needs SentencePiece and it is not installed."""
        folder = Path(pretrained_model_name_or_path)
        if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
            if importlib.util.find_spec("sentencepiece") is None:
                raise ValueError(
                    "the tokenizer is a tokenizer.model, which needs SentencePiece: pip install sentencepiece protobuf"
                )
            if not (folder / cls.settings_file).is_file():
                kwargs.setdefault("strip_around_images", True)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def num_image_tokens(self, width: int, height: int, num_images: int = 1) -> int:
        """Visual tokens of one of so many pictures, rounded up: all of them together have 256 and one each."""
        return -(-(self.num_patches + num_images) // num_images)

    def new_pixels(self) -> Any:
        """An empty collection of one call's pixels, as the family takes them."""
        return _Pixels(self.side)

    def apply_chat_template(self, conversation: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        """As in the base, with all pictures of a conversation in one place: the first image or video part.

        The rendered text is meant to be tokenised in two pieces, prompt and response. Where the tokenizer begins the
        response with a space, the text has none in front of it.
        """
        gap = "" if self.writes_gap and not kwargs.get("tokenize", False) else " "
        kwargs.setdefault("reply_gap", gap)
        return super().apply_chat_template(conversation, *args, **kwargs)

    def _place(self, messages: Sequence[dict], given: dict[str, Any]) -> tuple[list[dict], dict[str, list[Any]]]:
        parts = [part for message in messages for part in parts_of(message)]
        pictures = _pictures_of(parts, given)
        written = any(mark in part.get("text", "") for part in parts for mark in (IMAGE_MARK, VIDEO_MARK))
        to_place = bool(pictures) and not written
        rendered = []
        for message in messages:
            own = parts_of(message)
            content, placed = _join(own, mark=to_place)
            to_place = to_place and not placed
            rendered.append({**message, "content": content})
        if to_place:
            first = next((message for message in rendered if message["role"] == "user"), None)
            if first is None:
                raise ValueError(f"found {len(pictures)} pictures, but no user turn to put them in")
            first["content"] = IMAGE_MARK + "\n" + first["content"]
        if self.default_system is not None and rendered[0]["role"] != "system":
            rendered.insert(0, {"role": "system", "content": self.default_system})
        if pictures:
            rendered = [{**message, "content": self._wrap(message["content"])} for message in rendered]
        return rendered, {"image": pictures, "video": []}

    def _wrap(self, text: str) -> str:
        return text if MARK in text else re.sub(f"{IMAGE_MARK}|{VIDEO_MARK}", MARK, text)

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **options: Any) -> BatchFeature:
        """Tokenizes rendered texts, each with all of its pictures.

        `images`: the pictures of a single text, or a list of lists, one per text,
        or one picture for each text that names
        an image. `videos`: a list of videos (lists of frames) per text; their frames are pictures.
        Otherwise as in the base.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        names_image = [IMAGE_MARK in line or MARK in line or VIDEO_MARK in line for line in texts]
        samples = _pictures_per_text(images, names_image)
        for sample, films in zip(samples, videos or [], strict=False):
            sample += [as_frame(frame) for film in films for frame in frames_of(film)]
        return super().__call__(images=samples, text=texts if text is not None else None, **options)

    def _encode(self, text: str, images: list[Any], videos: list[list[Any]], pixels: Any) -> list[int]:
        """Token ids of one text with all of its placeholders."""
        if images:
            text = self._wrap(text)
        num_marks = text.count(MARK)
        if bool(images) != bool(num_marks) or (not images and IMAGE_MARK in text):
            raise ValueError(
                f"found {len(images)} pictures for a text that names {num_marks or text.count(IMAGE_MARK)} images"
            )
        bos = self.tokenizer.bos_token or ""
        pieces = text.removeprefix(bos).split(MARK)
        ids = [self.tokenizer.bos_token_id] if bos and text.startswith(bos) else []
        for index, piece in enumerate(pieces):
            if self.strip_around_images:
                piece = piece.lstrip() if index else piece
                piece = piece.rstrip() if index < num_marks else piece
            ids += self._tokenize(piece)
            if index < num_marks:
                ids += self._placeholders(len(images))
                pixels.add([open_image(source) for source in images])
        return ids

    def _tokenize(self, text: str) -> list[int]:
        """Every piece of text begins as a text of its own, with the space that Llama's tokenizer puts in front of it.

        The tokenizers of the original did so; that of transformers 5 does not where a piece follows a special token.
        """
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        if self.image_token_id in ids or self.video_token_id in ids:
            raise ValueError(
                f"the text itself contains {PATCH_TOKEN} or {FRAME_TOKEN}, which stand for visual tokens; write it"
                " differently"
            )
        return ids

    def _placeholders(self, num_pictures: int) -> list[int]:
        """The tokens of an image and the four that wrap them."""
        im_start, im_end, vi_start, vi_end = self.tokenizer.convert_tokens_to_ids(list(WRAPPERS))
        patches, frames = [self.image_token_id] * self.num_patches, [self.video_token_id] * num_pictures
        return [im_start, *patches, im_end, vi_start, *frames, vi_end]

    def clean_response(self, text: str) -> str:
        """A response without the turn that follows it and without the name of who speaks.

        >>> ValleyLlamaProcessor.clean_response(None, "### Assistant: A red shape.\\n### Human: Sure?")
        'A red shape.'
        """
        text = text.strip()
        while True:
            for prefix in (TURN, "Assistant:", "Response:", "Valley:"):
                if text.startswith(prefix):
                    text = text.removeprefix(prefix).strip()
                    break
            else:
                return text.partition(TURN)[0].strip()


class _Pixels:
    """Collects the pictures of a batch."""

    def __init__(self, side: int) -> None:
        self.side = side
        self.pictures: list[np.ndarray] = []
        self.counts: list[int] = []

    def add(self, pictures: list[Image.Image]) -> None:
        self.pictures += [clip_pixels(picture, self.side) for picture in pictures]
        self.counts.append(len(pictures))

    def arrays(self) -> dict[str, torch.Tensor]:
        if not self.counts:
            return {}
        return {
            "pixel_values": torch.from_numpy(np.stack(self.pictures)),
            "pictures_per_image": torch.tensor(self.counts),
        }


def clip_pixels(picture: Image.Image, side: int) -> np.ndarray:
    """A picture as CLIP takes it, `(3, side, side)` float32; a frame of a video file goes its own way,
    as in the original."""
    if FRAME_KEY in picture.info:
        scaled = resize_short_side(picture, round(side * FRAME_MARGIN), Image.Resampling.BILINEAR)
        return normalise(centre_crop(scaled, side, rounded=True))
    return normalise(centre_crop(resize_short_side(picture, side, Image.Resampling.BICUBIC), side))


def _token_ids(tokenizer: Any) -> tuple[int, int]:
    """The ids of `<im_patch>` and `<vi_frame>`. Raises ValueError where the tokenizer lacks one of the six tokens."""
    known = tokenizer.get_vocab()
    missing = [token for token in (PATCH_TOKEN, FRAME_TOKEN, *WRAPPERS) if token not in known]
    if missing:
        raise ValueError(f"the tokenizer has no token {', '.join(missing)}; is it that of the base model?")
    return known[PATCH_TOKEN], known[FRAME_TOKEN]


def _pictures_of(parts: list[dict], given: dict[str, Any]) -> list[Any]:
    """All pictures of a conversation in the order of its parts;
    parts without a source take the next of what is given."""
    rest = {
        kind: list(own) if isinstance(own, (list, tuple)) else [own] for kind, own in given.items() if own is not None
    }
    rest = {kind: rest.get(kind, []) for kind in ("image", "video")}
    has_parts = {kind: any(PART_KINDS.get(part["type"]) == kind for part in parts) for kind in rest}
    pictures: list[Any] = []
    for part in parts:
        kind = PART_KINDS.get(part["type"])
        if kind is None:
            continue
        source = source_of(part)
        if source is None and rest[kind]:
            source = rest[kind].pop(0)
        is_video = kind == "video" and source is not None
        pictures += [as_frame(frame) for frame in frames_of(source)] if is_video else [source]
    for kind, unplaced in rest.items():
        if unplaced and has_parts[kind]:
            raise ValueError(f"found {len(unplaced)} {kind}s more than the conversation has places for")
    return pictures + rest["image"] + [as_frame(frame) for film in rest["video"] for frame in frames_of(film)]


def _join(parts: list[dict], *, mark: bool) -> tuple[str, bool]:
    """One string of a message's parts, with a mark on a line of its own where the first picture stands;
    whether it has one."""
    text = ""
    placed = False
    for part in parts:
        if part["type"] == "text":
            joins = placed and text.endswith(IMAGE_MARK) and not part["text"].startswith("\n")
            text += "\n" * joins + part["text"]
        elif mark and not placed:
            text += ("\n" if text and not text.endswith("\n") else "") + IMAGE_MARK
            placed = True
    return text, placed


def _pictures_per_text(images: Any, names_image: list[bool]) -> list[list[Any]]:
    """The pictures of every text. Raises ValueError where it is unclear which belong to which."""
    given = list(images) if isinstance(images, (list, tuple)) else ([] if images is None else [images])
    if any(isinstance(own, (list, tuple)) for own in given):
        if len(given) != len(names_image):
            raise ValueError(f"expected pictures for {len(names_image)} texts, found them for {len(given)}")
        return [list(own) if isinstance(own, (list, tuple)) else [own] for own in given]
    if len(names_image) == 1:
        return [given]
    if given and len(given) != sum(names_image):
        raise ValueError(
            f"expected a list of pictures for each of {len(names_image)} texts, found {len(given)} pictures"
        )
    rest = iter(given)
    return [[next(rest)] if given and names else [] for names in names_image]
