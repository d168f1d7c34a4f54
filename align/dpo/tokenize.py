"""Preference pairs in, tokenised pairs out: each is rendered and tokenised here, once, and everything else reads that.

Texts are what the processor's own chat template writes. Nothing is ever truncated: `check_lengths` finds every pair
that does not fit before training starts, by counting tokens without running the image part on real pixels. A pair that
cannot be rendered or tokenised is left out and counted by reason.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from align.engines.prompts import right_padded
from align.errors import UserError
from align.log import log
from align.media.images import FRAME_FILE_KEY, ImageStore
from align.models.record_faults import CANNOT_READ, UnusableRecord, record_faults
from align.models.special_tokens import check_spelling, reserved_texts, special_tokens
from align.monitoring.progress import progress
from align.records import Pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

SHOWN_PAIRS = 20
CANNOT_RENDER = "the chat template cannot write it"
CANNOT_ENCODE = "the processor cannot encode its prompt"
SPELLS_TOKENS = "a response spells special tokens and cannot be tokenised as text"


class RenderedPair(NamedTuple):
    """A pair as text: the prompt up to the first token of the response, and both responses with their end of turn."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class TokenizedPair:
    """A pair as training, reference and length checks read it; the columns of the training dataset.

    `prompt` is the rendered text with one placeholder per image, which the processor encodes with the pixels;
    `prompt_tokens` counts it with its images' tokens. `chosen_ids` and `rejected_ids` end with the end of the turn.
    """

    id: str
    image_files: list[str]
    prompt: str
    prompt_tokens: int
    chosen_ids: list[int]
    rejected_ids: list[int]

    @property
    def longest(self) -> int:
        """Tokens of the prompt with the longer response."""
        return self.prompt_tokens + max(len(self.chosen_ids), len(self.rejected_ids))


@dataclass
class TokenizedPairs:
    """The pairs that can be trained on, and the ids of the others by the reason why they are left out."""

    pairs: list[TokenizedPair] = field(default_factory=list)
    dropped: dict[str, list[str]] = field(default_factory=dict)

    def drop(self, reason: str, id_: str) -> None:
        """Count a pair as left out."""
        self.dropped.setdefault(reason, []).append(id_)


def tokenize_pairs(
    pairs: Iterable[Pair], processor: ProcessorMixin, images: ImageStore, unreadable: Collection[str] = ()
) -> TokenizedPairs:
    """Every pair rendered and tokenised, in order; those that cannot be are left out with their reason.

    `unreadable`: images that are known to be damaged behind their header.

    Raises:
        UserError: no pair is left.
    """
    pairs = list(pairs)
    counter = PromptCounter(processor)
    found = TokenizedPairs()
    problem: UnusableRecord | None = None
    with progress("tokenise pairs", total=len(pairs)) as advance:
        for pair in pairs:
            advance(1)
            try:
                _check_images(pair, images, unreadable)
                found.pairs.append(tokenize_pair(pair, processor, images, counter))
            except UnusableRecord as error:
                problem = problem or error
                found.drop(error.reason, pair.id)
                if len(found.dropped[error.reason]) == 1:
                    log.warning("%s", error)
    for reason, ids in found.dropped.items():
        log.warning("%d of %d pairs are dropped: %s", len(ids), len(pairs), reason)
    if problem is not None and not found.pairs:
        raise UserError(f"no pair can be trained on; the first: {problem}") from None
    return found


def _check_images(pair: Pair, images: ImageStore, unreadable: Collection[str]) -> None:
    """Raises UnusableRecord where an image of the pair cannot be read."""
    with record_faults(f"pair {pair.id}", CANNOT_READ):
        for reference in pair.images:
            images.header(reference)
            if reference in unreadable:
                images.open(reference)


def tokenize_pair(pair: Pair, processor: ProcessorMixin, images: ImageStore, counter: PromptCounter) -> TokenizedPair:
    """One pair rendered and tokenised.

    Raises:
        UnusableRecord: see `render_pair` and `encode_responses`; or the processor refuses the prompt with its images.
        UserError: an image cannot be used.
    """
    rendered = render_pair(pair, processor)
    chosen_ids, rejected_ids = encode_responses(pair, rendered, processor)
    sizes = [images.size(reference) for reference in pair.images]
    are_frames = [images.is_frame(reference) for reference in pair.images]
    try:
        prompt_tokens = counter.count(rendered.prompt, sizes, are_frames=are_frames)
    except (ValueError, IndexError, KeyError, TypeError, ArithmeticError, StopIteration) as error:
        raise UnusableRecord(
            CANNOT_ENCODE,
            f"the processor cannot encode the prompt with its {len(sizes)} images: {error}",
            where=f"pair {pair.id}",
            fix="change the prompt or its images to keep the pair",
        ) from None
    return TokenizedPair(pair.id, pair.images, rendered.prompt, prompt_tokens, chosen_ids, rejected_ids)


def render_pair(pair: Pair, processor: ProcessorMixin) -> RenderedPair:
    """The pair as the chat template writes it; a response is what follows the prompt when the reply is added.

    Raises:
        UnusableRecord: the prompt spells a special token; the template refuses the messages, or does not write the
        prompt the same way before a reply: the
            response would then follow a prompt that the model never sees when it answers.
    """
    where = f"pair {pair.id}"
    messages = structured(pair.prompt)
    check_spelling(messages, reserved_texts(processor), where)
    continues = messages[-1]["role"] == "assistant"
    try:
        prompt = processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not continues, continue_final_message=continues
        )
        with_reply = [
            processor.apply_chat_template(messages + structured(reply), tokenize=False)
            for reply in (pair.chosen, pair.rejected)
        ]
    except Exception as error:
        # Templates are programs, and raise what they like for messages that they do not take.
        raise UnusableRecord(
            CANNOT_RENDER,
            f"the chat template refuses the messages: {error}",
            where=where,
            fix="change the messages, or use a template that takes them",
        ) from None
    for name, text in zip(("chosen", "rejected"), with_reply, strict=True):
        if not text.startswith(prompt):
            raise UnusableRecord(
                CANNOT_RENDER,
                f"the chat template writes the prompt differently once the {name} response follows: "
                f"expected it to begin with ...{prompt[-40:]!r}, found ...{_divergence(prompt, text)!r}",
                where=where,
                fix="use a chat template that renders the prompt the same way with and without a reply",
            )
    return RenderedPair(prompt, *(text[len(prompt) :] for text in with_reply))


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


def encode_responses(pair: Pair, rendered: RenderedPair, processor: ProcessorMixin) -> tuple[list[int], list[int]]:
    """The token ids of the chosen and of the rejected response, end of turn included.

    Text is tokenised as text: a response that spells `<|im_end|>` or `<image>` neither ends its turn in the middle nor
    asks for an image.

    Raises:
        UnusableRecord: a response spells such a token, and either the template does not write its text as it is, or the
            tokenizer has no other tokens for it.
    """
    special = special_tokens(processor)
    return (
        _encode(rendered.chosen, pair.chosen, special, processor.tokenizer, f"pair {pair.id}"),
        _encode(rendered.rejected, pair.rejected, special, processor.tokenizer, f"pair {pair.id}"),
    )


def _encode(
    rendered: str,
    reply: Sequence[dict[str, Any]],
    special: dict[str, int],
    tokenizer: PreTrainedTokenizerBase,
    where: str,
) -> list[int]:
    """The ids of a rendered reply; where its text spells special tokens, that text is tokenised by itself."""
    texts = [part.get("text") or "" for message in structured(reply) for part in message["content"]]
    if not any(token in text for token in special for text in texts):
        return tokenizer(rendered, add_special_tokens=False)["input_ids"]
    ids: list[int] = []
    rest = rendered
    for text in filter(None, (text.strip() for text in texts)):
        before, found, rest = rest.partition(text)
        as_text = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if not found or set(as_text) & set(special.values()):
            raise UnusableRecord(
                SPELLS_TOKENS,
                f"{SPELLS_TOKENS}: {text[:60]!r}",
                where=where,
                fix="the pair is left out; change the response to keep it",
            )
        ids += tokenizer(before, add_special_tokens=False)["input_ids"] + as_text
    return ids + tokenizer(rest, add_special_tokens=False)["input_ids"]


def encode_prompts(processor: ProcessorMixin, prompts: list[str], pictures: Sequence[Sequence[Any]]) -> dict[str, Any]:
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

    def __init__(self, processor: ProcessorMixin) -> None:
        self.processor = processor
        self._extra: dict[Any, int] = {}

    def count(self, prompt: str, sizes: Sequence[tuple[int, int]], *, are_frames: Sequence[bool] = ()) -> int:
        """Tokens of a rendered prompt with images of these (width, height) in pixels."""
        text_tokens = len(self.processor.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        key = (tuple(sizes), tuple(are_frames))
        if key not in self._extra:
            blanks = [Image.new("RGB", size) for size in sizes]
            for blank, is_frame in zip(blanks, are_frames, strict=False):
                blank.info.update({FRAME_FILE_KEY: True} if is_frame else {})
            with_images = encode_prompts(self.processor, [prompt], [blanks])["input_ids"].shape[1]
            self._extra[key] = with_images - text_tokens
        return text_tokens + self._extra[key]


def check_lengths(pairs: Sequence[TokenizedPair], max_length: int, *, drop: bool) -> set[str]:
    """The ids of pairs of which a prompt with a response is longer than `max_length` tokens.

    Raises:
        UserError: there are such pairs and they are not to be dropped, or dropping them leaves none.
    """
    too_long = [pair for pair in pairs if pair.longest > max_length]
    if too_long and (not drop or len(too_long) == len(pairs)):
        lines = [
            f"  {pair.id}: prompt {pair.prompt_tokens}, chosen {len(pair.chosen_ids)}, "
            f"rejected {len(pair.rejected_ids)} tokens"
            for pair in too_long[:SHOWN_PAIRS]
        ]
        if len(too_long) > SHOWN_PAIRS:
            lines.append(f"  and {len(too_long) - SHOWN_PAIRS} more")
        raise UserError(
            f"{len(too_long)} of {len(pairs)} pairs do not fit in {max_length} tokens, and nothing is truncated:\n"
            + "\n".join(lines)
            + "\n",
            fix="raise dpo.max_length, lower model.processor.max_pixels, or set dpo.on_too_long: drop",
        )
    return {pair.id for pair in too_long}


def _divergence(expected: str, found: str) -> str:
    start = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), len(found))
    return found[max(0, start - 20) : start + 20]
