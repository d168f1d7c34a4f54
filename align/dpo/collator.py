"""Preference pairs in, the tensors of one training batch out.

A row of the data set is ``{"pair": one line of pairs.jsonl, "index": its number}``, with ``ref_chosen_logps`` and
``ref_rejected_logps`` beside it where the reference is cached. Texts are rendered by the processor's own chat template
and images are opened here, in the loader's workers, so the data set stays small. Nothing is ever truncated: what does
not fit is found by `check_lengths` before training starts.

Two layouts are made. `plain` is TRL's: chosen and rejected are two separate rows that each repeat prompt and images.
`shared` puts ``[prompt | chosen | rejected]`` into one row (`align.prefix`); see `shared_batch` for what TRL then sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from align.errors import UserError
from align.images import ImageStore
from align.records import Pair

PLACEHOLDER_ATTRIBUTES = ("image_token_id", "video_token_id", "audio_token_id")


class RenderedPair(NamedTuple):
    """A pair as text: the prompt up to the first token of the response, and both responses with their end of turn."""

    prompt: str
    chosen: str
    rejected: str


class PairTokens(NamedTuple):
    """The token ids of both responses of a pair, end of turn included."""

    chosen: list[int]
    rejected: list[int]


def render_pair(pair: Pair, processor: Any) -> RenderedPair:
    """The pair as the chat template writes it; a response is what follows the prompt when the reply is added.

    Raises:
        UserError: the template does not write the prompt the same way before a reply (the response would then follow
            a prompt that the model never sees when it answers), or a response is empty.
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
        UserError: a response holds a placeholder of an image, for which there is no image.
    """
    tokenizer = processor.tokenizer
    placeholders = {getattr(processor, name, None) for name in PLACEHOLDER_ATTRIBUTES} - {None}
    encoded = []
    for name, text in (("chosen", rendered.chosen), ("rejected", rendered.rejected)):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if placeholders.intersection(ids):
            raise UserError(
                f"the {name} response contains an image placeholder token", where=where, fix="remove this pair"
            )
        encoded.append(ids)
    return PairTokens(*encoded)


@dataclass
class PairCollator:
    """Rows of the data set to one batch, in the plain or the shared layout.

    `pad_token_id` fills rows up to the longest; padding stands on the right and is masked.
    """

    processor: Any
    images: ImageStore
    layout: Literal["plain", "shared"] = "plain"

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pairs = [Pair.model_validate_json(row["pair"]) for row in rows]
        rendered = [render_pair(pair, self.processor) for pair in pairs]
        tokens = [
            encode_responses(text, self.processor, f"pair {pair.id}")
            for text, pair in zip(rendered, pairs, strict=True)
        ]
        prompts = [text.prompt for text in rendered]
        pictures = [[self.images.open(reference) for reference in pair.images] for pair in pairs]
        batch = plain_batch(self.encode_prompts(prompts * 2, pictures * 2), tokens, self.pad_token_id)
        batch["pair_index"] = torch.tensor([row["index"] for row in rows])
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows], dtype=torch.float32)
        return batch

    @property
    def pad_token_id(self) -> int:
        tokenizer = self.processor.tokenizer
        return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def encode_prompts(self, prompts: list[str], pictures: list[list[Any]]) -> dict[str, torch.Tensor]:
        """The processor's output for the prompts, padded on the right to (B, P)."""
        return dict(
            self.processor(
                images=pictures if any(pictures) else None,
                text=prompts,
                padding=True,
                padding_side="right",
                return_tensors="pt",
                # The template has already written every special token.
                add_special_tokens=False,
            )
        )


def plain_batch(
    prompt_inputs: dict[str, torch.Tensor], tokens: Sequence[PairTokens], pad_token_id: int
) -> dict[str, torch.Tensor]:
    """TRL's layout: n rows of prompt and chosen, then n rows of prompt and rejected, each (2n, L) int64.

    `prompt_inputs` holds the prompts twice over (2n rows, padded on the right) with whatever else the processor made;
    all of it is passed on. `completion_mask` is 1 on the tokens of a response.

    >>> prompts = {"input_ids": torch.tensor([[1, 2], [1, 2]]), "attention_mask": torch.ones(2, 2, dtype=torch.long)}
    >>> batch = plain_batch(prompts, [PairTokens(chosen=[3, 4], rejected=[5])], pad_token_id=0)
    >>> batch["input_ids"].tolist(), batch["completion_mask"].tolist()
    ([[1, 2, 3, 4], [1, 2, 5, 0]], [[0, 0, 1, 1], [0, 0, 1, 0]])
    """
    responses = [pair.chosen for pair in tokens] + [pair.rejected for pair in tokens]
    lengths = prompt_inputs["attention_mask"].sum(dim=1).tolist()
    prompts = [row[:length] for row, length in zip(prompt_inputs["input_ids"], lengths, strict=True)]
    batch = dict(prompt_inputs)
    batch["input_ids"] = _pad([torch.cat((p, _ids(r))) for p, r in zip(prompts, responses, strict=True)], pad_token_id)
    batch["attention_mask"] = _pad([torch.ones(n + len(r)) for n, r in zip(lengths, responses, strict=True)]).long()
    batch["completion_mask"] = _pad(
        [torch.cat((torch.zeros(n), torch.ones(len(r)))) for n, r in zip(lengths, responses, strict=True)]
    ).long()
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in prompt_inputs:
            batch[name] = _pad(
                [
                    torch.cat((row[:n], torch.zeros(len(r), dtype=row.dtype)))
                    for row, n, r in zip(prompt_inputs[name], lengths, responses, strict=True)
                ]
            )
    return batch


def _ids(tokens: Sequence[int]) -> torch.Tensor:
    return torch.tensor(tokens, dtype=torch.long)


def _pad(rows: list[torch.Tensor], value: int = 0) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def _divergence(expected: str, found: str) -> str:
    start = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), len(found))
    return found[max(0, start - 20) : start + 20]
