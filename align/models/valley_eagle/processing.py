"""Chat messages and images in, token ids with one placeholder per visual token and flat image tensors out.

The image tensors and their order are described in the modelling file. Where the original's entry points disagree the
choice is a keyword of `from_pretrained` (so of `AutoProcessor.from_pretrained`); see `ValleyProcessor`. Video is left out.
"""

import difflib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.utils import cached_file

from .configuration import IMAGE_TOKEN, ValleyEagleConfig
from .pixels import cut_tiles, open_image, qwen2vl_pixels, siglip_pixels
from .tiles import Geometry

IMAGE_MARK = "<image>"
IMAGE_START, IMAGE_END = "<im_start>", "<im_end>"
BLACK_IMAGE_SIZE = (3, 3)
DEFAULT_SYSTEM = "You are a helpful assistant."
MIN_PIXELS = 56 * 56

# Used where neither the folder nor its tokenizer brings a template. Contents are strings by the time it is rendered.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

SETTINGS = ("max_pixels", "min_pixels", "default_system", "text_only_image")
# A file of our own: the original's processor refuses keys in processor_config.json that it does not know.
SETTINGS_FILE = "valley_processor.json"
HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")
TOKENIZER_KEYWORDS = ("padding_side", "truncation_side", "model_max_length", "use_fast")


class ValleyProcessor(ProcessorMixin):
    """Valley-Eagle's processor.

    Settings, each a keyword of `from_pretrained`, are kept when the processor is saved:

    `max_pixels`: the most pixels the Qwen2-VL encoder sees of an image. Default: `max_pixels` of config.json, 571,536 in
    the published folders, which is what the model was trained with and bounds an image to 2,689 tokens. The published
    processor's own default is 12,845,056 (16,384 tokens from this encoder alone), its chat class's 1,003,520.
    `min_pixels`: the fewest, 3,136 by default; smaller images are enlarged.
    `default_system`: the system turn of a conversation that has none, by default `You are a helpful assistant.` as in
    the published processor; None leaves it to the tokenizer's chat template (`You are Qwen, created by Alibaba Cloud. ...`),
    which is what the training code did.
    `text_only_image`: `none` (default) asks text-only questions without an image, `black` puts a black 3 x 3 image in
    front of them as the published processor does.
    """

    def __init__(
        self,
        tokenizer=None,
        chat_template: str | None = None,
        *,
        config: ValleyEagleConfig | None = None,
        max_pixels: int | None = None,
        min_pixels: int = MIN_PIXELS,
        default_system: str | None = DEFAULT_SYSTEM,
        text_only_image: str = "none",
    ) -> None:
        config = config or ValleyEagleConfig()
        super().__init__(tokenizer, chat_template=chat_template or tokenizer.chat_template or CHAT_TEMPLATE)
        self.geometry: Geometry = config.geometry()
        self.use_special_start_end_token = config.use_special_start_end_token
        self.max_pixels = config.max_pixels if max_pixels is None else max_pixels
        self.min_pixels = min_pixels
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

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "ValleyProcessor":
        """Reads sizes from config.json and what settings the folder keeps; keywords go first.

        Raises ValueError for an unknown keyword or a value that is not allowed.
        """
        for internal in ("_from_auto", "trust_remote_code", "code_revision"):
            kwargs.pop(internal, None)
        config = kwargs.pop("config", None)
        settings = {name: kwargs.pop(name) for name in SETTINGS if name in kwargs}
        chat_template = kwargs.pop("chat_template", None)
        hub = {name: kwargs.pop(name) for name in HUB_KEYWORDS if name in kwargs}
        tokenizer_settings = {name: kwargs.pop(name) for name in TOKENIZER_KEYWORDS if name in kwargs}
        for name in kwargs:
            near = difflib.get_close_matches(name, SETTINGS, n=1) or [", ".join(SETTINGS)]
            raise ValueError(f"unknown setting {name!r} of {cls.__name__}; did you mean {near[0]}?")
        if not isinstance(config, ValleyEagleConfig):
            config = ValleyEagleConfig.from_pretrained(pretrained_model_name_or_path, **hub)
        stored, _ = cls.get_processor_dict(pretrained_model_name_or_path, **hub)
        tokenizer = AutoTokenizer.from_pretrained(
            pretrained_model_name_or_path, config=config, trust_remote_code=False, **hub, **tokenizer_settings
        )
        kept = {**stored, **_read_settings(pretrained_model_name_or_path, hub)}
        settings = {**{name: kept[name] for name in SETTINGS if name in kept}, **settings}
        return cls(tokenizer, chat_template or stored.get("chat_template"), config=config, **settings)

    def save_settings(self, folder: str | os.PathLike) -> None:
        """Adds the settings to a checkpoint folder in which no other file is to be touched."""
        settings = {name: getattr(self, name) for name in SETTINGS}
        Path(folder, SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """What processor_config.json holds: the settings; sizes stay in config.json, tokens in the tokenizer's files."""
        settings = {name: getattr(self, name) for name in SETTINGS}
        auto_map = getattr(self, "auto_map", None)
        return {**settings, "processor_class": type(self).__name__, **({"auto_map": auto_map} if auto_map else {})}

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

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        *,
        images: Sequence[Any] | None = None,
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

        Contents are strings, or lists of `{"type": "text", "text": ...}` and `{"type": "image", "image": ...}` (or `path`,
        `url`); an image part without an image takes the next of `images`. A place for an image is an image part or
        `<image>` in the text. Images in front of a message's text, and images that have no place, which go in front of the
        first user turn, are joined by a space and followed by a line break, as in the published processor. Where the texts
        say `<image>` as often as there are image parts, they place the images.

        Several conversations are padded, on the left where `add_generation_prompt`, so that `generate` can go on from them.
        """
        if template_kwargs.pop("truncation", None):
            raise ValueError("truncation is not supported: it would cut images in two")
        conversations, is_batch = ([conversation], False) if _is_one(conversation) else (list(conversation), True)
        given = [None] * len(conversations) if images is None else (list(images) if is_batch else [images])
        placed = [self._place_images(messages, own) for messages, own in zip(conversations, given, strict=True)]
        texts = [
            self.tokenizer.apply_chat_template(
                messages,
                chat_template=chat_template or self.chat_template,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **template_kwargs,
            )
            for messages, _ in placed
        ]
        if not tokenize:
            return texts if is_batch else texts[0]
        options: dict[str, Any] = {"padding": padding, "padding_side": padding_side, "return_tensors": return_tensors}
        options.update(processor_kwargs or {})
        if options["padding_side"] is None and add_generation_prompt:
            options["padding_side"] = "left"
        inputs = self(images=[found for _, found in placed], text=texts, **options)
        if not is_batch and options["return_tensors"] is None:
            inputs["input_ids"], inputs["attention_mask"] = inputs["input_ids"][0], inputs["attention_mask"][0]
        return inputs if return_dict else inputs["input_ids"]

    def _place_images(self, messages: Sequence[dict], images: Any) -> tuple[list[dict], list[Any]]:
        """Messages with string contents in which every image has its mark, and the images in that order."""
        unplaced = list(_as_list(images))
        num_parts = sum(part["type"] in ("image", "image_url") for message in messages for part in _parts(message))
        num_marks = sum(part.get("text", "").count(IMAGE_MARK) for message in messages for part in _parts(message))
        if num_marks and num_parts and num_marks != num_parts:
            raise ValueError(
                f"expected the texts to name all {num_parts} images of the conversation as {IMAGE_MARK} or none, "
                f"found {num_marks}"
            )
        found: list[Any] = []
        rendered = []
        for message in messages:
            parts = _parts(message)
            for part in parts:
                if part["type"] in ("image", "image_url"):
                    found.append(_source(part) or (unplaced.pop(0) if unplaced else None))
            text = _join(parts, mark_images=not num_marks)
            rendered.append({**message, "content": text})
        first_user = next((message for message in rendered if message["role"] == "user"), None)
        if num_marks and not num_parts:
            found, unplaced = [*found, *unplaced], []
        if not found and not unplaced and not num_marks and self.text_only_image == "black" and first_user:
            unplaced = [Image.new("RGB", BLACK_IMAGE_SIZE)]
        if unplaced and first_user is None:
            raise ValueError(f"found {len(unplaced)} images but no user turn to put them in")
        if unplaced and first_user is not None:
            if found:
                raise ValueError(f"found {len(unplaced)} images more than the conversation has places for")
            first_user["content"] = " ".join([IMAGE_MARK] * len(unplaced)) + "\n" + first_user["content"]
            found = unplaced
        if self.default_system is not None and rendered[0]["role"] != "system":
            rendered.insert(0, {"role": "system", "content": self.default_system})
        for message in rendered:
            message["content"] = self._wrap(message["content"])
        return rendered, found

    def _wrap(self, text: str) -> str:
        """Every image mark between its two special tokens, unless it is already."""
        if not self.use_special_start_end_token:
            return text
        return re.sub(f"(?<!{IMAGE_START}){IMAGE_MARK}", IMAGE_START + IMAGE_MARK + IMAGE_END, text)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        padding: bool | str | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        add_special_tokens: bool = False,
        truncation: bool | None = None,
        **unused: Any,
    ) -> BatchFeature:
        """Tokenizes rendered texts and expands every `<image>` in them to the tokens of its image.

        `images`: one image, a list of them in the order of their marks, or a list of lists, one per text. `padding`: as in
        transformers, and by default on where tensors of several texts are asked for; `padding_side` by default the
        tokenizer's. Gives `input_ids` and `attention_mask` `(B, L)` int64 and, where there are images, the image tensors
        of the modelling file. Raises ValueError where marks and images differ in number, for images that cannot be
        used, and for `truncation`, which would cut images in two.
        """
        if text is None:
            raise ValueError("expected text")
        unknown = [name for name, value in unused.items() if value is not None]
        if unknown:
            raise ValueError(f"{type(self).__name__} does not know {', '.join(unknown)}")
        if truncation or add_special_tokens:
            raise ValueError(
                "truncation and add_special_tokens are not supported: the chat template writes special tokens"
            )
        texts = [self._wrap(line) for line in ([text] if isinstance(text, str) else text)]
        samples = self._images_per_text(images, [line.count(IMAGE_MARK) for line in texts])
        ids, pixels = [], _Pixels()
        for index, (line, sources) in enumerate(zip(texts, samples, strict=True)):
            try:
                ids.append(self._encode(line, sources, pixels))
            except (ValueError, OSError) as error:
                raise ValueError(f"text {index}: {error}" if len(texts) > 1 else str(error)) from error
        if padding is None:
            padding = return_tensors is not None and len(ids) > 1
        data: dict[str, Any] = self._pad(ids, padding, padding_side or self.tokenizer.padding_side)
        data.update(pixels.arrays(self.geometry.eagle))
        return BatchFeature(data, tensor_type=return_tensors)

    def _images_per_text(self, images: Any, num_marks: list[int]) -> list[list[Any]]:
        """Images of every text: as given, dealt out by the marks of the texts, or the black image that stands for none."""
        given = list(_as_list(images))
        if given and all(isinstance(own, (list, tuple)) for own in given):
            samples = [list(own) for own in given]
        else:
            samples, rest = [], list(given)
            for count in num_marks:
                samples.append(rest[:count])
                rest = rest[count:]
            if rest:
                raise ValueError(f"expected {sum(num_marks)} images, as many as the texts name, found {len(given)}")
        if len(samples) != len(num_marks):
            raise ValueError(f"expected images for {len(num_marks)} texts, found them for {len(samples)}")
        for index, count in enumerate(num_marks):
            if not samples[index] and count == 1 and self.text_only_image == "black":
                samples[index] = [Image.new("RGB", BLACK_IMAGE_SIZE)]
            if len(samples[index]) != count:
                raise ValueError(
                    f"text {index}: expected {count} images, as many as it names, found {len(samples[index])}"
                )
        return samples

    def _encode(self, text: str, sources: list[Any], pixels: "_Pixels") -> list[int]:
        """Token ids of one text, every chunk between images on its own as the original does it."""
        chunks = [
            self.tokenizer(chunk, add_special_tokens=False)["input_ids"] if chunk else []
            for chunk in text.split(IMAGE_MARK)
        ]
        if any(self.image_token_id in chunk for chunk in chunks):
            raise ValueError(
                f"the text contains {self.image_token!r}, which stands for visual tokens; write it differently"
            )
        tiled = self.geometry.is_tiled(len(sources))
        ids = list(chunks[0])
        for source, chunk in zip(sources, chunks[1:], strict=True):
            image = open_image(source)
            num_tokens = self.num_image_tokens(*image.size, num_images=len(sources))
            pixels.add(image, self, tiled=tiled)
            ids += [self.image_token_id] * num_tokens + chunk
        return ids

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
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        return self.tokenizer.decode(*args, **kwargs)


class _Pixels:
    """Collects the image arrays of a batch."""

    def __init__(self) -> None:
        self.tiles: list[np.ndarray] = []
        self.sizes: list[tuple[int, int]] = []
        self.patches: list[np.ndarray] = []
        self.grids: list[tuple[int, int, int]] = []

    def add(self, image: Image.Image, processor: ValleyProcessor, *, tiled: bool) -> None:
        geometry = processor.geometry
        self.tiles.append(siglip_pixels(cut_tiles(image, geometry, tiled=tiled)))
        self.sizes.append(image.size)
        if geometry.eagle:
            limits = {"min_pixels": processor.min_pixels, "max_pixels": processor.max_pixels}
            patches, grid = qwen2vl_pixels(image, geometry, **limits)
            self.patches.append(patches)
            self.grids.append(grid)

    def arrays(self, eagle: bool) -> dict[str, torch.Tensor]:
        if not self.tiles:
            return {}
        data = {
            "pixel_values": torch.from_numpy(np.concatenate(self.tiles)),
            "tiles_per_image": torch.tensor([len(tiles) for tiles in self.tiles]),
            "image_sizes": torch.tensor(self.sizes),
        }
        if eagle:
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


def _read_settings(folder: str | os.PathLike, hub: dict[str, Any]) -> dict[str, Any]:
    path = cached_file(folder, SETTINGS_FILE, _raise_exceptions_for_missing_entries=False, **hub)
    return json.loads(Path(path).read_text(encoding="utf-8")) if path else {}


def _is_one(conversation: Sequence[Any]) -> bool:
    return not conversation or isinstance(conversation[0], dict)


def _as_list(images: Any) -> Sequence[Any]:
    if images is None:
        return []
    return images if isinstance(images, (list, tuple)) else [images]


def _parts(message: dict) -> list[dict]:
    """A message's content as a list of parts."""
    content = message.get("content") or ""
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _source(part: dict) -> Any:
    """The image of an image part, under any of the names in use; None where it has none."""
    for key in ("image", "path", "url", "image_url"):
        source = part.get(key)
        if source is not None:
            return source["url"] if key == "image_url" and isinstance(source, dict) else source
    return None


def _join(parts: list[dict], *, mark_images: bool) -> str:
    """One string of a message's parts; marks in front of the first text are set off from it."""
    text, num_leading = "", 0
    for part in parts:
        if part["type"] == "text":
            text += part["text"]
        elif part["type"] not in ("image", "image_url"):
            raise ValueError(f"expected parts of type 'text' or 'image', found {part['type']!r}")
        elif mark_images and not text:
            num_leading += 1
        elif mark_images:
            text += IMAGE_MARK
    return " ".join([IMAGE_MARK] * num_leading) + "\n" + text if num_leading else text
