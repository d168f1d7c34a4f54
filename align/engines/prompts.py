"""Chat messages and images in, right-padded model inputs out; and a branched prompt cut into its prompt and segments.

The chat template is rendered by the processor. For a branched prompt it is rendered once, with a mark where the
branches begin: what stands before the mark (images included) is the prompt that all branches share, and what stands
behind it follows every branch. Pieces are tokenised one by one,
so that the shared and the unshared path read the very same tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from align.errors import UserError
from align.models.record_faults import MAX_RENDER_S, bounded_time, without_nulls
from align.prefix.layout import Segment
from reward.judge_model import BranchedPrompt

if TYPE_CHECKING:
    from transformers import ProcessorMixin

BRANCH_MARK = "[[[here the branches begin]]]"
# What is asked of a processor before anything is loaded.
QUESTION = "What is shown?"
BLANK_PX = (112, 84)


@dataclass(frozen=True)
class PromptTree:
    """A branched prompt as a prompt text and a tree of segments:
    `leaf_segments[b]` is the segment in which branch b ends.

    `options[o]` are the tokens of option o.
    """

    prompt: str
    segments: list[Segment]
    leaf_segments: list[int]
    options: list[list[int]]


def of_segments(values: Tensor, rows: Sequence[Sequence[Segment]]) -> list[list[list[float]]]:
    """From `(B, S)` values of the tokens of whole rows to those of each row's segments.

    >>> of_segments(torch.tensor([[1.0, 2.0, 3.0]]), [[Segment([7]), Segment([8, 9])]])
    [[[1.0], [2.0, 3.0]]]
    """
    found = []
    for row, segments in zip(values.tolist(), rows, strict=True):
        rest = iter(row)
        found.append([[next(rest) for _ in segment.token_ids] for segment in segments])
    return found


class Processor(Protocol):
    """What a processor of texts and images (or, for models of texts alone, a tokenizer) is used for here."""

    def apply_chat_template(self, conversation: Any, **settings: Any) -> Any:
        """A chat as the model's prompt."""
        ...

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        """Texts and images as the model's inputs."""
        ...


class Prompter:
    """Renders and encodes prompts with a processor (or, for text-only models, a tokenizer)."""

    def __init__(self, processor: Processor, open_image: Callable[[Any], Any]) -> None:
        self.processor: ProcessorMixin = processor
        self.open_image = open_image
        alone = isinstance(processor, PreTrainedTokenizerBase)
        self.tokenizer: PreTrainedTokenizerBase = processor if alone else cast(Any, processor).tokenizer
        # A fast tokenizer keeps how it pads, and whether it splits special tokens, from one call to the next: two
        # threads (`align.engines.prefetch`) would get each other's tokens.
        self._one_at_a_time = threading.Lock()

    def render(self, messages: Sequence[dict[str, Any]]) -> str:
        """The prompt as text, ready for the assistant's turn."""
        chat = [without_nulls(message) for message in messages]
        if self.processor is self.tokenizer:
            chat = [{**message, "content": _as_text(message["content"])} for message in chat]
        return self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)

    def encode(self, texts: Sequence[str], images: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """Model inputs of a batch, right-padded, on the CPU. Rows must all have images, or all have none."""
        return self.encode_opened(texts, [[self.open_image(image) for image in row] for row in images])

    def encode_opened(self, texts: Sequence[str], images: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """As `encode`, of images that are opened already."""
        arguments: dict[str, Any] = {"text": list(texts)}
        if any(images):
            arguments["images"] = [list(row) for row in images]
        with self._one_at_a_time:
            inputs = self.processor(
                **arguments, padding=True, padding_side="right", return_tensors="pt", add_special_tokens=False
            )
        return right_padded(dict(inputs))

    def tokenise(self, text: str) -> list[int]:
        """The tokens of a piece of text by itself; what looks like a special token in it is plain text.

        A response that says `<image>` or `<|im_end|>` must neither ask for an image nor end the turn.
        """
        with self._one_at_a_time:
            return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def build_tree(self, branched: BranchedPrompt) -> PromptTree:
        """Cut a branched prompt into what is shared and what branches.

        Pieces that several branches begin with become one segment; from where a branch is alone, its pieces, the
        tail and the template's rest are one segment too.
        """
        text = self.render(_messages(branched))
        if text.count(BRANCH_MARK) != 1:
            raise UserError(
                "the chat template does not reproduce the user's text exactly once",
                fix="check the critic's chat template",
            )
        prompt, rest = text.split(BRANCH_MARK)
        with self._one_at_a_time:
            end = self.tokenizer.encode(branched.tail + rest, add_special_tokens=False)
        segments: list[Segment] = []
        at: dict[tuple[str, ...], int] = {}
        leaf_segments = []
        for branch in branched.branches:
            parent = None
            shared = _shared_length(branch, branched.branches)
            for depth in range(1, shared + 1):
                if branch[:depth] not in at:
                    at[branch[:depth]] = len(segments)
                    segments.append(Segment(self.tokenise(branch[depth - 1]), parent))
                parent = at[branch[:depth]]
            own = [token for piece in branch[shared:] for token in self.tokenise(piece)]
            leaf_segments.append(len(segments))
            segments.append(Segment(own + end, parent))
        return PromptTree(prompt, segments, leaf_segments, [self.tokenise(option) for option in branched.options])


def check_prompts(processor: ProcessorMixin, where: str) -> None:
    """Write and encode a question with a blank image, as every stage will.

    Raises:
        UserError: the chat template cannot be used, leaves out the question or its image, or does not go with the
            processor.
    """
    prompter = Prompter(processor, lambda image: image)
    words = {"type": "text", "text": QUESTION}
    fix = "check chat_template in the folder: it must write texts, and a placeholder for every image"
    try:
        with bounded_time(MAX_RENDER_S):
            with_image, without = (
                prompter.render([{"role": "user", "content": content}])
                for content in ([{"type": "image"}, words], [words])
            )
    except Exception as error:
        # Templates are programs: whatever they raise is the folder's fault.
        raise UserError(f"the chat template cannot be used: {error}", where=where, fix=fix) from None
    if QUESTION not in with_image:
        raise UserError("the chat template does not write the question", where=where, fix=fix)
    if prompter.processor is prompter.tokenizer:
        return
    if with_image == without:
        raise UserError("the chat template writes nothing where an image stands", where=where, fix=fix)
    try:
        prompter.encode([with_image], [[Image.new("RGB", BLANK_PX)]])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"a question with an image cannot be encoded: {error}",
            where=where,
            fix="check chat_template, tokenizer_config.json and the processor's files in the folder",
        ) from None


def _shared_length(branch: tuple[str, ...], branches: Sequence[tuple[str, ...]]) -> int:
    """How many leading pieces of a branch some other branch has too.

    >>> branches = (("a", "b"), ("a", "c"), ("d", "a"))
    >>> [_shared_length(branch, branches) for branch in branches]
    [1, 1, 0]
    """
    longest = len(branch)
    return max(
        (
            depth
            for depth in range(longest + 1)
            if depth == 0 or sum(other[:depth] == branch[:depth] for other in branches) > 1
        ),
        default=0,
    )


def _messages(branched: BranchedPrompt) -> list[dict[str, Any]]:
    user = [{"type": "image"} for _ in branched.images] + [{"type": "text", "text": branched.head + BRANCH_MARK}]
    system = (
        [] if branched.system is None else [{"role": "system", "content": [{"type": "text", "text": branched.system}]}]
    )
    return [*system, {"role": "user", "content": user}]


def _as_text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def right_padded(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs with every row's padding at its end, whichever side the processor pads."""
    mask = inputs["attention_mask"].bool()
    if not (mask[:, 1:] & ~mask[:, :-1]).any():
        return inputs
    order = (~mask).to(torch.int8).argsort(dim=1, stable=True)
    return {
        name: value.gather(1, order) if isinstance(value, Tensor) and value.shape == mask.shape else value
        for name, value in inputs.items()
    }


def to_device(inputs: dict[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Tensors on the device, floating ones (pixels) in the model's dtype; lists of tensors likewise."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)
        if isinstance(value, (list, tuple)):
            return type(value)(move(item) for item in value)
        return value

    return {name: move(value) for name, value in inputs.items()}
