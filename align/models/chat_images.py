"""Chat messages with images and videos in, token ids with one placeholder per visual token and flat image tensors out.

What the families' processors have in common: where images stand in a text, how a text between them is tokenised, how
rows are padded, how settings are read and kept. A family says how many tokens an image has and what tensors it becomes
(`new_pixels`). Texts name an image as `<image>` and a video, where videos are given, as `<video>`; neither is a token.
"""

import difflib
import itertools
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from transformers import AutoTokenizer, BatchFeature, PreTrainedConfig, ProcessorMixin
from transformers.utils import cached_file

from .messages import IMAGE_MARK, VIDEO_MARK, place
from .open_image import open_image

DEFAULT_SYSTEM = "You are a helpful assistant."

# Used where neither the folder nor its tokenizer brings a template. Contents are strings by the time it is rendered.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")
TOKENIZER_KEYWORDS = ("padding_side", "truncation_side", "model_max_length", "use_fast")


class Pixels(Protocol):
    """Collects the image tensors of a batch."""

    def add_image(self, image: Any, num_images: int) -> int:
        """Takes an RGB image of a text with so many of them; gives its number of visual tokens."""

    def add_video(self, frames: list[Any]) -> int:
        """Takes the frames of a video; gives its number of visual tokens."""

    def arrays(self) -> dict[str, torch.Tensor]:
        """The tensors of all that was added, in that order; empty where nothing was."""


class ImageChatProcessor(ProcessorMixin):
    """Base of the processors of our families; `settings` are keywords of `from_pretrained`, kept when saved."""

    config_class: ClassVar[type[PreTrainedConfig]]
    settings: ClassVar[tuple[str, ...]] = ("default_system", "num_video_frames")
    image_inputs: ClassVar[tuple[str, ...]] = ()
    # A file of our own: the originals' processors refuse keys in processor_config.json that they do not know.
    settings_file: ClassVar[str] = "processor_settings.json"

    # Keywords of the authors' own processor whose values config.json has here; any other value is refused.
    published_keywords: ClassVar[tuple[str, ...]] = ()

    takes_videos: ClassVar[bool] = True
    # `<image>` and `<video>` in a rendered text stand for what is shown, whatever the tokenizer makes of them.
    replaces_marks: ClassVar[bool] = True

    image_token_id: int
    default_system: str | None
    num_video_frames: int

    def __init__(self, tokenizer: Any, chat_template: str | None) -> None:
        super().__init__(tokenizer, chat_template=chat_template)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token

    # What a family says.

    def new_pixels(self) -> Pixels:
        """An empty collection of one call's pixels, as the family takes them."""
        raise NotImplementedError

    def num_image_tokens(self, width: int, height: int, num_images: int = 1) -> int:
        """Visual tokens of one image of this size in pixels, in a text with `num_images` images."""
        raise NotImplementedError

    def blank_image(self) -> Any:
        """The image that a text-only question is asked with; None asks it without."""
        return None

    def _wrap(self, text: str) -> str:
        """A rendered text with whatever the family puts around its image marks; wrapping twice changes nothing."""
        return text

    def _spread_videos(self, text: str, images: list[Any], videos: list[list[Any]]) -> tuple[str, list[Any], list[Any]]:
        """A text with its images and videos as the family reads them: videos may become images here."""
        return text, images, videos

    def frame_indices(self, num_frames: int, frames_per_second: float | None = None) -> list[int]:
        """Which frames of a video are looked at: `num_video_frames` of them, evenly spaced, first and last included.

        Truncated to whole numbers as in the originals; a shorter video has frames twice. `frames_per_second` is for
        families that pick by time.
        """
        del frames_per_second
        return np.linspace(0, num_frames - 1, self.num_video_frames).astype(int).tolist()

    # Reading and keeping settings.

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Reads sizes from config.json and what settings the folder keeps; keywords go first.

        Raises ValueError for an unknown keyword or a value that is not allowed.
        """
        for internal in ("_from_auto", "trust_remote_code", "code_revision"):
            kwargs.pop(internal, None)
        config = kwargs.pop("config", None)
        settings = {name: kwargs.pop(name) for name in cls.settings if name in kwargs}
        chat_template = kwargs.pop("chat_template", None)
        hub = {name: kwargs.pop(name) for name in HUB_KEYWORDS if name in kwargs}
        tokenizer_settings = {name: kwargs.pop(name) for name in TOKENIZER_KEYWORDS if name in kwargs}
        published = {name: kwargs.pop(name) for name in cls.published_keywords if name in kwargs}
        for name in kwargs:
            near = difflib.get_close_matches(name, cls.settings, n=1) or [", ".join(cls.settings)]
            raise ValueError(f"unknown setting {name!r} of {cls.__name__}; did you mean {near[0]}?")
        if not isinstance(config, cls.config_class):
            config = cls.config_class.from_pretrained(pretrained_model_name_or_path, **hub)
        for name, value in published.items():
            # A config.json that says nothing of it has both encoders.
            stated = getattr(config, name, False if name == "only_navit" else value)
            if value != stated:
                raise ValueError(f"{name}: expected {stated!r} as in the checkpoint's config.json, found {value!r}")
        stored, _ = cls.get_processor_dict(pretrained_model_name_or_path, **hub)
        tokenizer = AutoTokenizer.from_pretrained(
            pretrained_model_name_or_path, config=config, trust_remote_code=False, **hub, **tokenizer_settings
        )
        kept = {**stored, **_read_settings(pretrained_model_name_or_path, cls.settings_file, hub)}
        settings = {**{name: kept[name] for name in cls.settings if name in kept}, **settings}
        return cls(tokenizer, chat_template or stored.get("chat_template"), config=config, **settings)  # type: ignore[call-arg]

    def save_settings(self, folder: str | os.PathLike) -> None:
        """Adds the settings to a checkpoint folder in which no other file is to be touched,
        unless it has them already."""
        settings = {name: getattr(self, name) for name in self.settings}
        own, general = Path(folder, self.settings_file), Path(folder, "processor_config.json")
        stored = json.loads(general.read_text(encoding="utf-8")) if general.is_file() else {}
        if own.is_file() or any(name not in stored or stored[name] != value for name, value in settings.items()):
            own.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """What processor_config.json holds: the settings; sizes stay in config.json,
        tokens in the tokenizer's files."""
        settings = {name: getattr(self, name) for name in self.settings}
        auto_map = getattr(self, "auto_map", None)
        return {**settings, "processor_class": type(self).__name__, **({"auto_map": auto_map} if auto_map else {})}

    @property
    def model_input_names(self) -> list[str]:
        """The names of everything that the model takes."""
        return ["input_ids", "attention_mask", *self.image_inputs]

    # Messages to text.

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        *,
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
        tools: list | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        padding: bool | None = None,
        padding_side: str | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        **template_kwargs: Any,
    ) -> Any:
        """Renders one conversation, or a list of them, as text, or where `tokenize` as model inputs.

        Contents are strings, or lists of `{"type": "text", "text": ...}` and `{"type": "image", "image": ...}` (or
        `path`, `url`; a video likewise, as a list of frames); an image part without an image takes the next of
        `images`. A place for an image is an image part or `<image>` in the text. Images in front of a message's text,
        and images that have no place, which go in front of the first user turn, are joined by a space and followed by a
        line break. Where the texts say `<image>` as often as there are image parts, they place the images.
        Other keywords go to the template.

        Several conversations are padded, on the left where `add_generation_prompt`, for `generate` to continue them.
        """
        if template_kwargs.pop("truncation", None):
            raise ValueError("truncation is not supported: it would cut images in two")
        conversations, is_batch = ([conversation], False) if _is_one(conversation) else (list(conversation), True)
        if not all(conversations):
            raise ValueError("expected at least one message, found an empty conversation")
        given = ([None] * len(conversations) if it is None else it if is_batch else [it] for it in (images, videos))
        placed = [
            self._place(messages, {"image": own, "video": own_videos})
            for messages, own, own_videos in zip(conversations, *given, strict=True)
        ]
        template_kwargs |= {
            "chat_template": chat_template or self.chat_template,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }
        texts = [self.tokenizer.apply_chat_template(text, tokenize=False, **template_kwargs) for text, _ in placed]
        if not tokenize:
            return texts if is_batch else texts[0]
        side = "left" if padding_side is None and add_generation_prompt else padding_side
        options = {"padding": padding, "padding_side": side, "return_tensors": return_tensors} | (
            processor_kwargs or {}
        )
        if any(found["video"] for _, found in placed):
            options["videos"] = [found["video"] for _, found in placed]
        inputs = self(images=[found["image"] for _, found in placed], text=texts, **options)
        if not is_batch and options["return_tensors"] is None:
            inputs["input_ids"], inputs["attention_mask"] = inputs["input_ids"][0], inputs["attention_mask"][0]
        return inputs if return_dict else inputs["input_ids"]

    def _place(self, messages: Sequence[dict], given: dict[str, Any]) -> tuple[list[dict], dict[str, list[Any]]]:
        """Messages as the template takes them, with a system turn and wrapped marks, and what stands at the marks."""
        rendered, found = place(
            messages, {kind: list(_as_list(own)) for kind, own in given.items()}, self.blank_image()
        )
        if self.default_system is not None and rendered[0]["role"] != "system":
            rendered.insert(0, {"role": "system", "content": self.default_system})
        for message in rendered:
            message["content"] = self._wrap(message["content"])
        return rendered, found

    # Text to model inputs.

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        *,
        padding: bool | str | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        add_special_tokens: bool = False,
        truncation: bool | None = None,
        **unused: Any,
    ) -> BatchFeature:
        """Tokenizes rendered texts and expands every `<image>` and `<video>` in them to its visual tokens.

        `images`: one image, a list of them in the order of their marks, or a list of lists, one per text. `videos`: a
        list of videos (lists of frames) per text; without it `<video>` is plain text. `padding`: as in transformers,
        and by default on where tensors of several texts are asked for; `padding_side` by default the tokenizer's. Gives
        `input_ids` and `attention_mask` `(B, L)` int64 and, where there are images, the tensors of the modelling file.
        Raises ValueError where marks and images differ in number, for images that cannot be used, and for `truncation`,
        which would cut images in two.

        One dict `{"conversations": [...], "images": [...]}` in place of all this is how
        ByteDance's processors are called.
        """
        if isinstance(images, dict) and "conversations" in images:
            return self._published_call(images, return_tensors=return_tensors or "pt", **unused)
        if text is None:
            raise ValueError("expected text")
        unknown = [name for name, value in unused.items() if value is not None]
        if unknown:
            raise ValueError(f"{type(self).__name__} does not know {', '.join(unknown)}")
        if truncation or add_special_tokens:
            raise ValueError(
                "truncation and add_special_tokens are not supported: the chat template writes special tokens"
            )
        texts = [text] if isinstance(text, str) else list(text)
        samples = _images_per_text(images, [line.count(IMAGE_MARK) for line in texts], self.blank_image())
        films = [[] for _ in texts] if videos is None else [list(own) for own in videos]
        if len(films) != len(texts):
            raise ValueError(f"expected a list of videos for each of {len(texts)} texts, found {len(films)}")
        ids, pixels = [], self.new_pixels()
        for index, (line, sources, own_videos) in enumerate(zip(texts, samples, films, strict=True)):
            try:
                spread = self._spread_videos(line, sources, own_videos)
                ids.append(self._encode(*spread, pixels))
            except (ValueError, OSError) as error:
                raise ValueError(f"text {index}: {error}" if len(texts) > 1 else str(error)) from error
        if padding is None:
            padding = return_tensors is not None and len(ids) > 1
        data: dict[str, Any] = self._pad(ids, padding, padding_side or self.tokenizer.padding_side)
        data.update(pixels.arrays())
        return BatchFeature(data, tensor_type=return_tensors)

    def _published_call(
        self,
        sample: dict[str, Any],
        *,
        inference: bool = True,
        return_tensors: str | None = "pt",
        **template_kwargs: Any,
    ) -> BatchFeature:
        """Model inputs `(1, L)` of a conversation of `{"role", "content"}` or `{"from", "value"}` turns and its images.

        They are this toolkit's (`model.generate(**inputs)`). Raises ValueError for `inference=False`,
        which asks for labels.
        """
        if not inference:
            raise ValueError("inference=False asks for training labels, which this processor does not make")
        turns = [_turn(turn) for turn in sample["conversations"]]
        return self.apply_chat_template(
            turns,
            images=list(_as_list(sample.get("images"))),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors=return_tensors,
            **template_kwargs,
        )

    def _encode(self, text: str, images: list[Any], videos: list[list[Any]], pixels: Pixels) -> list[int]:
        """Token ids of one text, every piece between its marks on its own as the originals do it."""
        text = self._wrap(text)
        marks = (IMAGE_MARK, VIDEO_MARK) if videos else (IMAGE_MARK,)
        pieces = re.split("(" + "|".join(marks) + ")", text)
        counts = {"images": pieces.count(IMAGE_MARK), "videos": pieces.count(VIDEO_MARK) if videos else 0}
        for name, found in (("images", images), ("videos", videos)):
            if len(found) != counts[name]:
                raise ValueError(f"expected {counts[name]} {name}, as many as the text names, found {len(found)}")
        queues = {IMAGE_MARK: iter(images), VIDEO_MARK: iter(videos)}
        ids: list[int] = []
        for piece in pieces:
            if piece in marks:
                ids += [self.image_token_id] * self._add(piece, next(queues[piece]), len(images), pixels)
            elif piece:
                tokens = self.tokenizer(piece, add_special_tokens=False)["input_ids"]
                if self.image_token_id in tokens:
                    raise ValueError(
                        f"the text contains {self.tokenizer.convert_ids_to_tokens(self.image_token_id)!r}, which "
                        "stands for visual tokens; write it differently"
                    )
                ids += tokens
        return ids

    def _add(self, mark: str, source: Any, num_images: int, pixels: Pixels) -> int:
        if mark == IMAGE_MARK:
            return pixels.add_image(open_image(source), num_images)
        return pixels.add_video(frames_of(source))

    def _pad(self, ids: list[list[int]], padding: bool | str, side: str) -> dict[str, Any]:
        masks = [[1] * len(row) for row in ids]
        if padding in (True, "longest"):
            longest, pad_id = max(len(row) for row in ids), self.tokenizer.pad_token_id
            for rows, filler in ((masks, 0), (ids, pad_id)):
                for index, row in enumerate(rows):
                    fill = [filler] * (longest - len(row))
                    rows[index] = fill + row if side == "left" else row + fill
        elif padding not in (False, "do_not_pad"):
            raise ValueError(f"padding: expected True, False, 'longest' or 'do_not_pad', found {padding!r}")
        return {"input_ids": ids, "attention_mask": masks}

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """The tokenizer's."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """The tokenizer's."""
        return self.tokenizer.decode(*args, **kwargs)


def frames_of(video: Any) -> list[Any]:
    """The frames of a video as RGB images. Raises ValueError for anything but a list of at least one frame."""
    if not isinstance(video, (list, tuple)) or not video:
        raise ValueError(f"expected a video as a list of frames, found {type(video).__name__}; read its frames first")
    return [open_image(frame) for frame in video]


def _read_settings(folder: str | os.PathLike, name: str, hub: dict[str, Any]) -> dict[str, Any]:
    path = cached_file(folder, name, _raise_exceptions_for_missing_entries=False, **hub)
    return json.loads(Path(path).read_text(encoding="utf-8")) if path else {}


def _images_per_text(images: Any, num_marks: list[int], blank: Any) -> list[list[Any]]:
    """Images of every text: as given, dealt out by the marks of the texts, or the blank one that stands for none."""
    given = list(_as_list(images))
    if given and all(isinstance(own, (list, tuple)) for own in given):
        if len(given) != len(num_marks):
            raise ValueError(f"expected images for {len(num_marks)} texts, found them for {len(given)}")
        samples = [list(own) for own in given]
    else:
        if given and len(given) != sum(num_marks):
            raise ValueError(f"expected {sum(num_marks)} images, as many as the texts name, found {len(given)}")
        rest = iter(given)
        samples = [list(itertools.islice(rest, count)) for count in num_marks]
    if blank is not None:
        samples = [own or [blank] * (count == 1) for own, count in zip(samples, num_marks, strict=True)]
    return samples


def _turn(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn of a published conversation as a chat message.

    >>> _turn({"from": "human", "value": "<image>?"})
    {'role': 'user', 'content': '<image>?'}
    """
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    return {"role": {"human": "user", "gpt": "assistant"}.get(str(role), role), "content": content}


def _is_one(conversation: Sequence[Any]) -> bool:
    return not conversation or isinstance(conversation[0], dict)


def _as_list(sources: Any) -> Sequence[Any]:
    if sources is None:
        return []
    return sources if isinstance(sources, (list, tuple)) else [sources]
