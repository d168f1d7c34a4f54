"""Pixtral's processor (Mistral 3, Pixtral) for machines without torchvision, where transformers withholds its own.

Rendered texts and images in, `input_ids`, `attention_mask`, padded `pixel_values` and `image_sizes` out; files are read
and written as transformers' class of the same name does. Every `[IMG]` of a text becomes a grid: a token per merged
patch, `[IMG_BREAK]` at the end of a row, `[IMG_END]` at the end of the last
(https://huggingface.co/docs/transformers/model_doc/pixtral).
This can go when transformers' class can be imported without torchvision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import BatchFeature, ProcessorMixin


class PixtralProcessor(ProcessorMixin):
    """`patch_size` is the encoder's, in pixels; `spatial_merge_size` patches along a side become one token."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int = 16,
        spatial_merge_size: int = 1,
        chat_template: str | None = None,
        image_token: str = "[IMG]",
        image_break_token: str = "[IMG_BREAK]",
        image_end_token: str = "[IMG_END]",
        **unused: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.patch_size = patch_size
        self.spatial_merge_size = spatial_merge_size
        self.image_token = image_token
        self.image_break_token = image_break_token
        self.image_end_token = image_end_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)

    @property
    def model_input_names(self) -> list[str]:
        """The names of everything that the model takes."""
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        return_tensors: str | None = None,
        **options: Any,
    ) -> BatchFeature:
        """`images`: one, a list of them in the order of their marks, or a list of lists, one per text.

        Other keywords go to the tokenizer. Raises ValueError where texts and images differ in number.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        pictures = _flat(images)
        num_marks = sum(line.count(self.image_token) for line in texts)
        if num_marks != len(pictures):
            raise ValueError(f"expected {num_marks} images, as many as the texts name, found {len(pictures)}")
        data: dict[str, Any] = {}
        if pictures:
            edge = self.patch_size * self.spatial_merge_size
            options_of_pixels = {"patch_size": {"height": edge, "width": edge}, "return_tensors": return_tensors}
            data = dict(self.image_processor(pictures, **options_of_pixels))
            grids = iter([self._grid(height // edge, width // edge) for height, width in _pairs(data["image_sizes"])])
            texts = [self._expanded(line, grids) for line in texts]
        tokens = self.tokenizer(texts, return_tensors=return_tensors, **options)
        return BatchFeature({**tokens, **data}, tensor_type=return_tensors)

    def _grid(self, rows: int, columns: int) -> str:
        """The tokens of one image."""
        row = self.image_token * columns
        return self.image_break_token.join([row] * rows) + self.image_end_token

    def _expanded(self, text: str, grids: Any) -> str:
        first, *rest = text.split(self.image_token)
        return first + "".join(next(grids) + piece for piece in rest)

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """The tokenizer's."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """The tokenizer's."""
        return self.tokenizer.decode(*args, **kwargs)


def _flat(images: Any) -> list[Any]:
    if images is None:
        return []
    given = images if isinstance(images, (list, tuple)) else [images]
    return [image for own in given for image in (own if isinstance(own, (list, tuple)) else [own])]


def _pairs(sizes: Any) -> list[tuple[int, int]]:
    return [(int(height), int(width)) for height, width in sizes]
