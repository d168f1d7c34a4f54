"""Preference pairs in, their texts, token ids and lengths out.

Texts are what the processor's own chat template writes. Nothing is ever truncated: `check_lengths` finds every pair
that does not fit before training starts, by counting tokens without running the image part on real pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from PIL import Image

from align.engines.prompts import right_padded
from align.errors import UserError
from align.media.images import FRAME_FILE_KEY, ImageStore
from align.records import Pair

PLACEHOLDER_ATTRIBUTES = ("image_token_id", "video_token_id", "audio_token_id")
SHOWN_PAIRS = 20


class RenderedPair(NamedTuple):
    """A pair as text: the prompt up to the first token of the response, and both responses with their end of turn."""

    prompt: str
    chosen: str
    rejected: str


class PairTokens(NamedTuple):
    """The token ids of both responses of a pair, end of turn included."""

    chosen: list[int]
    rejected: list[int]


class PairLength(NamedTuple):
    """Tokens of a pair: of the prompt with its images, and of each response."""

    id: str
    prompt: int
    chosen: int
    rejected: int

    @property
    def longest(self) -> int:
        return self.prompt + max(self.chosen, self.rejected)


def render_pair(pair: Pair, processor: Any) -> RenderedPair:
    """The pair as the chat template writes it; a response is what follows the prompt when the reply is added.

    Raises:
        UserError: the template does not write the prompt the same way before a reply: the response would then follow
            a prompt that the model never sees when it answers.
    """
    messages = structured(pair.prompt)
    continues = messages[-1]["role"] == "assistant"
    prompt = processor.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=not continues, continue_final_message=continues
    )
    responses = []
    for name, reply in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        whole = processor.apply_chat_template(messages + structured(reply), tokenize=False)
        if not whole.startswith(prompt):
            raise UserError(
                f"the chat template writes the prompt differently once the {name} response follows: "
                f"expected it to begin with ...{prompt[-40:]!r}, found ...{_divergence(prompt, whole)!r}",
                where=f"pair {pair.id}",
                fix="use a chat template that renders the prompt the same way with and without a reply",
            )
        responses.append(whole[len(prompt) :])
    return RenderedPair(prompt, *responses)


def structured(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose contents are all lists of parts, as chat templates of vision-language models expect.

    >>> structured([{"role": "user", "content": "hello"}])
    [{'role': 'user', 'content': [{'type': 'text', 'text': 'hello'}]}]
    """
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message["content"], str)
        else dict(message)
        for message in messages
    ]


def encode_responses(rendered: RenderedPair, processor: Any, where: str) -> PairTokens:
    """The token ids of both responses.

    Raises:
        UserError: a response holds the placeholder of an image, for which there is no image.
    """
    placeholders = {getattr(processor, name, None) for name in PLACEHOLDER_ATTRIBUTES} - {None}
    encoded = []
    for name, text in (("chosen", rendered.chosen), ("rejected", rendered.rejected)):
        ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        if placeholders.intersection(ids):
            raise UserError(f"the {name} response contains an image placeholder", where=where, fix="remove this pair")
        encoded.append(ids)
    return PairTokens(*encoded)


def spelling_placeholders(pairs: Iterable[Pair], processor: Any) -> set[str]:
    """The ids of pairs in which a response spells the placeholder of an image, as a policy now and then does.

    Read again, the response would ask for an image that there is not.
    """
    ids = {getattr(processor, name, None) for name in PLACEHOLDER_ATTRIBUTES} - {None}
    # Ids beyond the tokenizer's own have no spelling, and no text leads to them.
    spelt = [token for token in processor.tokenizer.convert_ids_to_tokens(list(ids)) if token]
    return {pair.id for pair in pairs if any(token in text for token in spelt for text in _response_texts(pair))}


def _response_texts(pair: Pair) -> Iterator[str]:
    for message in structured([*pair.chosen, *pair.rejected]):
        yield from (part.get("text") or "" for part in message["content"])


def encode_prompts(processor: Any, prompts: list[str], pictures: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """What the processor makes of n prompts and their images, padded on the right: `input_ids` (n, P) and more."""
    inputs = processor(
        images=[list(images) for images in pictures] if any(pictures) else None,
        text=prompts,
        padding=True,
        padding_side="right",
        return_tensors="pt",
        # The template has already written every special token.
        add_special_tokens=False,
    )
    return right_padded(dict(inputs))


class PromptCounter:
    """Counts the tokens of prompts with images, from the sizes of the images alone.

    How many tokens images take depends on their number and sizes, and on whether they are frames of a video, and not on
    what they show: blank images of the same sizes are encoded once for every new combination.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self._extra: dict[Any, int] = {}

    def count(self, prompt: str, sizes: Sequence[tuple[int, int]], *, are_frames: Sequence[bool] = ()) -> int:
        text_tokens = len(self.processor.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        key = (tuple(sizes), tuple(are_frames))
        if key not in self._extra:
            blanks = [Image.new("RGB", size) for size in sizes]
            for blank, is_frame in zip(blanks, are_frames, strict=False):
                blank.info.update({FRAME_FILE_KEY: True} if is_frame else {})
            with_images = encode_prompts(self.processor, [prompt], [blanks])["input_ids"].shape[1]
            self._extra[key] = with_images - text_tokens
        return text_tokens + self._extra[key]


def pair_lengths(pairs: Iterable[Pair], processor: Any, images: ImageStore) -> list[PairLength]:
    """How many tokens every pair has."""
    counter = PromptCounter(processor)
    lengths = []
    for pair in pairs:
        rendered = render_pair(pair, processor)
        tokens = encode_responses(rendered, processor, f"pair {pair.id}")
        sizes = [images.size(reference) for reference in pair.images]
        are_frames = [images.is_frame(reference) for reference in pair.images]
        prompt = counter.count(rendered.prompt, sizes, are_frames=are_frames)
        lengths.append(PairLength(pair.id, prompt, len(tokens.chosen), len(tokens.rejected)))
    return lengths


def check_lengths(lengths: Sequence[PairLength], max_length: int, *, drop: bool) -> set[str]:
    """The ids of pairs of which a prompt with a response is longer than `max_length` tokens.

    Raises:
        UserError: there are such pairs and they are not to be dropped, or dropping them leaves none.
    """
    too_long = [length for length in lengths if length.longest > max_length]
    if too_long and (not drop or len(too_long) == len(lengths)):
        lines = [
            f"  {pair.id}: prompt {pair.prompt}, chosen {pair.chosen}, rejected {pair.rejected} tokens"
            for pair in too_long[:SHOWN_PAIRS]
        ]
        if len(too_long) > SHOWN_PAIRS:
            lines.append(f"  and {len(too_long) - SHOWN_PAIRS} more")
        raise UserError(
            f"{len(too_long)} of {len(lengths)} pairs do not fit in {max_length} tokens, and nothing is truncated:\n"
            + "\n".join(lines)
            + "\n",
            fix="raise dpo.max_length, lower model.processor.max_pixels, or set dpo.too_long: drop",
        )
    return {pair.id for pair in too_long}


def _divergence(expected: str, found: str) -> str:
    start = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), len(found))
    return found[max(0, start - 20) : start + 20]
