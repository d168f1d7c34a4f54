"""Rows of the training dataset in, the tensors of one batch out.

A row is a tokenised pair (`align.dpo.tokenize`) with its number, and with ``ref_chosen_logps`` and
``ref_rejected_logps`` beside it where the reference is cached. Nothing is rendered or tokenised here but the prompts
with their pixels: images are opened in the loader's workers, so the dataset stays small.

Two layouts are made. `plain` is TRL's: chosen and rejected are separate rows that each repeat prompt and images.
`shared` puts ``[prompt | chosen | rejected]`` into one row, with the images of a pair once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from align.dpo.sharding.dummy_batches import split_dummy_row
from align.dpo.tokenize import TokenizedPair, encode_prompts
from align.errors import UserError
from align.media.images import ImageStore
from align.prefix.layout import Layout, Segment

# Large enough for the smallest size that processors accept.
BLANK_PX = 56
LAYOUT_PREFIX = "prefix_"
PER_TOKEN_KEYS = ("token_type_ids", "mm_token_type_ids")
PAIR_COLUMNS = tuple(field.name for field in fields(TokenizedPair))
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
LayoutName = Literal["plain", "shared"]


def pair_dataset(pairs: Sequence[TokenizedPair], reference: Sequence[tuple[float, float]] | None = None) -> Dataset:
    """The pairs as TRL's training dataset, with the log-probabilities of the reference where they are known.

    `reference` has one (chosen, rejected) per pair: natural-log probabilities summed over the response's tokens. The
    column `length` (tokens) lets `train_sampling_strategy: group_by_length` work. No column is called `image` or
    `images`: TRL has a way of its own with those.
    """
    columns: dict[str, Any] = {name: [getattr(pair, name) for pair in pairs] for name in PAIR_COLUMNS}
    columns |= {"index": list(range(len(pairs))), "length": [pair.longest for pair in pairs]}
    if reference is not None:
        for position, name in enumerate(REFERENCE_COLUMNS):
            columns[name] = [values[position] for values in reference]
    return Dataset.from_dict(columns)


@dataclass(frozen=True)
class PairCollator:
    """Rows of the dataset to one batch.

    `max_length` is the limit that was checked before training; a longer row here means that the check was wrong.
    `always_images` adds, to a batch without any image, a dummy row that has a blank image and no response: where
    weights are sharded over processes, all of them must run the vision tower or wait for each other forever. In the
    plain layout the model needs `align.dpo.sharding.dummy_batches.add_dummy_rows` for it.
    """

    processor: Any
    images: ImageStore
    layout: LayoutName = "plain"
    max_length: int | None = None
    always_images: bool = False

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """The batch of `collate`, with `pair_index` (n,) int64 and the reference (n,) float32 where there is one."""
        batch = self.collate([TokenizedPair(**{name: row[name] for name in PAIR_COLUMNS}) for row in rows])
        batch["pair_index"] = torch.tensor([row["index"] for row in rows])
        for name in REFERENCE_COLUMNS:
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows], dtype=torch.float32)
        return batch

    def collate(self, pairs: Sequence[TokenizedPair]) -> dict[str, Tensor]:
        """The model's inputs and the masks of n pairs, see `plain_batch` and `shared_batch`."""
        responses = [[pair.chosen_ids for pair in pairs], [pair.rejected_ids for pair in pairs]]
        return self.batch([pair.prompt for pair in pairs], [pair.image_files for pair in pairs], responses)

    def batch(
        self, prompts: list[str], image_files: Sequence[Sequence[str]], responses: Sequence[Sequence[Sequence[int]]]
    ) -> dict[str, Tensor]:
        """A batch of n prompts with K responses each; `responses[k][b]` are token ids, empty where there is none."""
        pictures = [[self.images.open(name) for name in names] for names in image_files]
        dummy = self.always_images and not any(pictures)
        dummy_prompt, dummy_picture = ([self._dummy_prompt()], [[_blank_picture()]]) if dummy else ([], [])
        if self.layout == "shared":
            inputs = encode_prompts(self.processor, prompts + dummy_prompt, pictures + dummy_picture)
            batch = shared_batch(inputs, responses, self.pad_token_id)
        else:
            repeats = len(responses)
            inputs = encode_prompts(
                self.processor, prompts * repeats + dummy_prompt, pictures * repeats + dummy_picture
            )
            if dummy:
                responses = [*responses, [[]]]
            batch = plain_batch(inputs, responses, self.pad_token_id)
            if dummy:
                batch = split_dummy_row(batch)
        self._check_length(batch)
        return batch

    @property
    def pad_token_id(self) -> int:
        """The id that fills rows; masks say where it stands."""
        tokenizer = self.processor.tokenizer
        return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def _dummy_prompt(self) -> str:
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "."}]}]
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _check_length(self, batch: dict[str, Tensor]) -> None:
        if self.max_length is None:
            return
        if self.layout == "shared":
            layout = layout_of(batch)
            longest = int((layout.prompt_lengths + (layout.path_position + layout.is_token).amax(dim=1)).max())
        else:
            longest = int(batch["attention_mask"].sum(dim=1).max())
        if longest > self.max_length:
            raise UserError(f"a row has {longest} tokens, more than the {self.max_length} that were checked for")


def plain_batch(
    prompt_inputs: dict[str, Tensor], responses: Sequence[Sequence[Sequence[int]]], pad_token_id: int
) -> dict[str, Tensor]:
    """TRL's layout: the n prompts with their first responses, then with their second ones: (2n, L) int64.

    `prompt_inputs` holds the prompts once per response (2n rows, padded on the right) with whatever else the processor
    made; all of it is passed on. `completion_mask` is 1 on the tokens of a response.

    >>> prompts = {"input_ids": torch.tensor([[1, 2], [1, 2]]), "attention_mask": torch.ones(2, 2, dtype=torch.long)}
    >>> batch = plain_batch(prompts, [[[3, 4]], [[5]]], pad_token_id=0)
    >>> batch["input_ids"].tolist(), batch["completion_mask"].tolist()
    ([[1, 2, 3, 4], [1, 2, 5, 0]], [[0, 0, 1, 1], [0, 0, 1, 0]])
    """
    completions = [response for group in responses for response in group]
    lengths = prompt_inputs["attention_mask"].sum(dim=1).tolist()
    batch = dict(prompt_inputs)

    def behind_prompts(prompts: Tensor | None, tails: list[Tensor], value: int = 0) -> Tensor:
        heads = [torch.zeros(n, dtype=torch.long) for n in lengths]
        if prompts is not None:
            heads = [row[:n] for row, n in zip(prompts, lengths, strict=True)]
        rows = [torch.cat((head, tail)) for head, tail in zip(heads, tails, strict=True)]
        return pad_sequence(rows, batch_first=True, padding_value=value)

    ones = [torch.ones(len(ids), dtype=torch.long) for ids in completions]
    zeros = [torch.zeros(len(ids), dtype=torch.long) for ids in completions]
    batch["input_ids"] = behind_prompts(prompt_inputs["input_ids"], [_ids(ids) for ids in completions], pad_token_id)
    batch["attention_mask"] = behind_prompts(prompt_inputs["attention_mask"], ones)
    batch["completion_mask"] = behind_prompts(None, ones)
    for name in PER_TOKEN_KEYS:
        if name in prompt_inputs:
            batch[name] = behind_prompts(prompt_inputs[name], zeros)
    return batch


def shared_batch(
    prompt_inputs: dict[str, Tensor], responses: Sequence[Sequence[Sequence[int]]], pad_token_id: int
) -> dict[str, Tensor]:
    """The shared layout: n rows ``[prompt | response 1 | ... | response K]`` for the model, (K n, 1 + C) ones for TRL.

    What TRL reads: `input_ids` (K n, 1 + C), the last token of the prompt and then the response, all first responses
    before all second ones; `completion_mask` of the same shape; `attention_mask` (n, P + S), of the tokens that are
    really computed, since TRL counts with it. What the model reads instead (`align.dpo.shared_forward`): `prompt_ids`
    (n, P), whatever else the processor made of prompts and images, and the fields of the `Layout` under ``prefix_``.
    Prompts beyond those that have responses are run and give nothing.

    >>> prompts = {"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.ones(1, 2, dtype=torch.long)}
    >>> batch = shared_batch(prompts, [[[3, 4]], [[5]]], pad_token_id=0)
    >>> batch["input_ids"].tolist(), batch["completion_mask"].tolist()
    ([[2, 3, 4], [2, 5, 0]], [[0, 1, 1], [0, 1, 0]])
    >>> batch["prompt_ids"].tolist(), batch["prefix_input_ids"].tolist(), batch["attention_mask"].tolist()
    ([[1, 2]], [[3, 4, 5]], [[1, 1, 1, 1, 1]])
    """
    batch = dict(prompt_inputs)
    prompt_ids, prompt_mask = batch.pop("input_ids"), batch.pop("attention_mask")
    rows = [[Segment(group[b]) for group in responses if b < len(group)] for b in range(len(prompt_ids))]
    layout = Layout.build(prompt_mask.bool(), rows, pad_token_id)
    last = prompt_ids.gather(1, prompt_mask.sum(dim=1, keepdim=True) - 1)[:, 0].tolist()
    completions = [[last[b], *response] for group in responses for b, response in enumerate(group)]
    batch["input_ids"] = pad_sequence([_ids(ids) for ids in completions], batch_first=True, padding_value=pad_token_id)
    masks = [_ids([0] + [1] * (len(ids) - 1)) for ids in completions]
    batch["completion_mask"] = pad_sequence(masks, batch_first=True)
    batch["attention_mask"] = torch.cat((prompt_mask, layout.is_token.to(prompt_mask.dtype)), dim=1)
    batch["prompt_ids"] = prompt_ids
    for field in fields(Layout):
        batch[LAYOUT_PREFIX + field.name] = getattr(layout, field.name)
    return batch


def layout_of(batch: dict[str, Any]) -> Layout:
    """The `Layout` that `shared_batch` put into a batch."""
    return Layout(**{field.name: batch[LAYOUT_PREFIX + field.name] for field in fields(Layout)})


def prompt_inputs_of(batch: dict[str, Any]) -> dict[str, Any]:
    """What the processor made of the prompts, from a batch of `shared_batch`."""
    ours = {"attention_mask", "completion_mask", "prompt_ids", "pair_index", *REFERENCE_COLUMNS}
    inputs = {name: value for name, value in batch.items() if name not in ours and not name.startswith(LAYOUT_PREFIX)}
    return inputs | {
        "input_ids": batch["prompt_ids"],
        "attention_mask": batch[LAYOUT_PREFIX + "prompt_mask"].to(batch["prompt_ids"].dtype),
    }


def _blank_picture() -> Image.Image:
    return Image.new("RGB", (BLANK_PX, BLANK_PX))


def _ids(tokens: Sequence[int]) -> Tensor:
    return torch.tensor(tokens, dtype=torch.long)
