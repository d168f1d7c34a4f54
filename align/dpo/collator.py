"""Rows of the training dataset in, the tensors of one batch out.

A row is a tokenised pair (`align.dpo.tokenize`) with its number, and with ``ref_chosen_logps`` and
``ref_rejected_logps`` beside it where the reference is cached. Nothing is rendered or tokenised here but the prompts
with their pixels: images are opened in the loader's workers, so the dataset stays small.

Two layouts are made. `plain` is TRL's: chosen and rejected are separate rows that each repeat prompt and images.
`shared` puts ``[prompt | chosen | rejected]`` into one row, with the images of a pair once, or all pairs of a question
(`align.dpo.rows`).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from align.dpo.rows import Grouping, Row, corrupted_rows, rows_of
from align.dpo.sharding.dummy_batches import split_dummy_row
from align.dpo.tokenize import TokenizedPair, encode_prompts
from align.errors import UserError
from align.media.corruption import Corruption, corrupted
from align.media.images import ImageStore
from align.prefix.layout import Layout, Segment

if TYPE_CHECKING:
    from transformers import ProcessorMixin

# Large enough for the smallest size that processors accept.
BLANK_PX = 56
LAYOUT_PREFIX = "prefix_"
PER_TOKEN_KEYS = ("token_type_ids", "mm_token_type_ids")
PAIR_COLUMNS = tuple(field.name for field in fields(TokenizedPair))
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
# What a pair counts in the mean of a step (`align.dpo.rows.pair_weights`).
WEIGHT_COLUMN = "pair_weight"
# Which tokens of the rows TRL's responses are.
TOKEN_INDEX = LAYOUT_PREFIX + "token_index"
# The same of the chosen responses under corrupted pictures, which of those are tokens, and which pairs have a picture.
CORRUPTED_INDEX, CORRUPTED_MASK = LAYOUT_PREFIX + "corrupted_index", LAYOUT_PREFIX + "corrupted_mask"
HAS_PICTURE = LAYOUT_PREFIX + "has_picture"
CORRUPTED_REFERENCE = "ref_corrupted_logps"
# What is in a batch for the trainer and not for the model.
TRAINER_COLUMNS = ("pair_index", WEIGHT_COLUMN, CORRUPTED_REFERENCE, *REFERENCE_COLUMNS)
LayoutName = Literal["plain", "shared"]


def pair_dataset(
    pairs: Sequence[TokenizedPair],
    reference: Sequence[tuple[float, float]] | None = None,
    weights: Sequence[float] | None = None,
    corrupted: Sequence[float] | None = None,
) -> Dataset:
    """The pairs as TRL's training dataset, with the log-probabilities of the reference where they are known.

    `reference` has one (chosen, rejected) per pair: natural-log probabilities summed over the response's tokens.
    `weights`: what each counts in the mean of a step, where that is not left to TRL. `corrupted`: the reference's
    log-probability of each chosen response under the corrupted picture. The column `length` (tokens) lets
    `train_sampling_strategy: group_by_length` work. No column is called `image` or `images`: TRL has a way of its own
    with those.
    """
    columns: dict[str, Any] = {name: [getattr(pair, name) for pair in pairs] for name in PAIR_COLUMNS}
    columns |= {"index": list(range(len(pairs))), "length": [pair.longest for pair in pairs]}
    if reference is not None:
        for position, name in enumerate(REFERENCE_COLUMNS):
            columns[name] = [values[position] for values in reference]
    if corrupted is not None:
        columns[CORRUPTED_REFERENCE] = list(corrupted)
    if weights is not None:
        columns[WEIGHT_COLUMN] = list(weights)
    return Dataset.from_dict(columns)


@dataclass(frozen=True)
class PairCollator:
    """Rows of the dataset to one batch.

    `grouping`: what a row of the shared layout holds; in the plain one every response is a row of its own.
    `corruption`, for the shared layout: every row with pictures gets another beside it, with the same pictures saying
    less (drawn by `seed`; `other` draws of `pool`) and the chosen responses.
    `max_length` is the limit that was checked before training; a longer row here means that the check was wrong.
    `always_images` adds, to a batch without any image, a dummy row that has a blank image and no response: where
    weights are sharded over processes, all of them must run the vision tower or wait for each other forever. In the
    plain layout the model needs `align.dpo.sharding.dummy_batches.add_dummy_rows` for it.
    """

    processor: ProcessorMixin
    images: ImageStore
    layout: LayoutName = "plain"
    max_length: int | None = None
    always_images: bool = False
    grouping: Grouping = "pair"
    corruption: Corruption | None = None
    seed: int = 0
    pool: tuple[str, ...] = ()

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """The batch of `collate`, with `pair_index` (n,) int64; reference and weights (n,) float32 where there are."""
        collated = self.collate([TokenizedPair(**{name: row[name] for name in PAIR_COLUMNS}) for row in rows])
        # First, since transformers takes the length of the first tensor for the number of examples.
        batch = {"pair_index": torch.tensor([row["index"] for row in rows]), **collated}
        for name in TRAINER_COLUMNS[1:]:
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows], dtype=torch.float32)
        return batch

    def collate(self, pairs: Sequence[TokenizedPair]) -> dict[str, Tensor]:
        """The model's inputs and the masks of n pairs, see `plain_batch` and `shared_batch`."""
        rows, places = rows_of(pairs, self.grouping if self.layout == "shared" else "pair")
        if self.corruption is None:
            return self.batch(rows, places)
        assert self.layout == "shared", "corrupted pictures need the shared layout"
        others, extra = corrupted_rows(pairs, rows, places)
        batch = without_corrupted(self.batch([*rows, *others], [*places, *extra]), len(extra))
        return batch | {HAS_PICTURE: torch.tensor([bool(pair.image_files) for pair in pairs])}

    def batch(self, rows: Sequence[Row], places: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """A batch of rows; `places` has the row and the branch of each response that TRL reads, in its order."""
        in_model = rows if self.layout == "shared" else [rows[row] for row, _ in places]
        prompts = [row.prompt for row in in_model]
        pictures = [self._pictures(row) for row in in_model]
        dummy = self.always_images and not any(pictures)
        if dummy:
            prompts, pictures = [*prompts, self._dummy_prompt()], [*pictures, [_blank_picture()]]
        inputs = encode_prompts(self.processor, prompts, pictures)
        if self.layout == "shared":
            batch = shared_batch(inputs, [row.branches for row in rows], places, self.pad_token_id)
        else:
            responses = [rows[row].branches[branch] for row, branch in places]
            batch = plain_batch(inputs, [*responses, []] if dummy else responses, self.pad_token_id)
            if dummy:
                batch = split_dummy_row(batch)
        self._check_length(batch)
        return batch

    def _pictures(self, row: Row) -> list[Image.Image]:
        opened = [self.images.open(name) for name in row.image_files]
        if not row.corrupted:
            return opened
        assert self.corruption is not None
        pool = [name for name in self.pool if name not in row.image_files] or row.image_files

        def another(drawn: random.Random) -> Image.Image:
            return self.images.open(drawn.choice(pool))

        return [
            corrupted(picture, self.corruption, self.seed, f"{place}/{row.image_files}/{row.prompt}", another)
            for place, picture in enumerate(opened)
        ]

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
    prompt_inputs: dict[str, Tensor], responses: Sequence[Sequence[int]], pad_token_id: int
) -> dict[str, Tensor]:
    """TRL's layout: a row (., L) int64 for each response, for n pairs all chosen and then all rejected ones.

    `prompt_inputs` holds the prompt of every response (padded on the right) with whatever else the processor made; all
    of it is passed on. `completion_mask` is 1 on the tokens of a response.

    >>> prompts = {"input_ids": torch.tensor([[1, 2], [1, 2]]), "attention_mask": torch.ones(2, 2, dtype=torch.long)}
    >>> batch = plain_batch(prompts, [[3, 4], [5]], pad_token_id=0)
    >>> batch["input_ids"].tolist(), batch["completion_mask"].tolist()
    ([[1, 2, 3, 4], [1, 2, 5, 0]], [[0, 0, 1, 1], [0, 0, 1, 0]])
    """
    lengths = prompt_inputs["attention_mask"].sum(dim=1).tolist()
    batch = dict(prompt_inputs)

    def behind_prompts(prompts: Tensor | None, tails: list[Tensor], value: int = 0) -> Tensor:
        heads = [torch.zeros(n, dtype=torch.long) for n in lengths]
        if prompts is not None:
            heads = [row[:n] for row, n in zip(prompts, lengths, strict=True)]
        rows = [torch.cat((head, tail)) for head, tail in zip(heads, tails, strict=True)]
        return pad_sequence(rows, batch_first=True, padding_value=value)

    ones = [torch.ones(len(ids), dtype=torch.long) for ids in responses]
    zeros = [torch.zeros(len(ids), dtype=torch.long) for ids in responses]
    batch["input_ids"] = behind_prompts(prompt_inputs["input_ids"], [_ids(ids) for ids in responses], pad_token_id)
    batch["attention_mask"] = behind_prompts(prompt_inputs["attention_mask"], ones)
    batch["completion_mask"] = behind_prompts(None, ones)
    for name in PER_TOKEN_KEYS:
        if name in prompt_inputs:
            batch[name] = behind_prompts(prompt_inputs[name], zeros)
    return batch


def shared_batch(
    prompt_inputs: dict[str, Tensor],
    branches: Sequence[Sequence[Sequence[int]]],
    places: Sequence[tuple[int, int]],
    pad_token_id: int,
) -> dict[str, Tensor]:
    """The shared layout: n rows ``[prompt | branch 1 | branch 2 | ...]`` for the model, (R, 1 + C) ones for TRL.

    `branches[b]`: the token ids of the responses of row b; `places`: the row and the branch of each of the R
    responses that TRL reads, any of them as often as it likes. What TRL reads: `input_ids` (R, 1 + C), the last token
    of the prompt and then the response; `completion_mask` of the same shape; `attention_mask` (n, P + S), of the tokens
    that are really computed, since TRL counts with it. What the model reads instead (`align.dpo.shared_forward`):
    `prompt_ids` (n, P), whatever else the processor made of prompts and images, the fields of the `Layout` under
    ``prefix_``, and there `token_index` (R, C) int64, where among the n S tokens behind the prompts the tokens of TRL's
    responses are. Prompts beyond those that have branches are run and give nothing.

    >>> prompts = {"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.ones(1, 2, dtype=torch.long)}
    >>> batch = shared_batch(prompts, [[[3, 4], [5]]], [(0, 0), (0, 1)], pad_token_id=0)
    >>> batch["input_ids"].tolist(), batch["completion_mask"].tolist()
    ([[2, 3, 4], [2, 5, 0]], [[0, 1, 1], [0, 1, 0]])
    >>> batch["prompt_ids"].tolist(), batch["prefix_input_ids"].tolist(), batch["attention_mask"].tolist()
    ([[1, 2]], [[3, 4, 5]], [[1, 1, 1, 1, 1]])
    >>> batch["prefix_token_index"].tolist()
    [[0, 1], [2, 0]]
    """
    batch = dict(prompt_inputs)
    prompt_ids, prompt_mask = batch.pop("input_ids"), batch.pop("attention_mask")
    behind = [[Segment(ids) for ids in row] for row in branches]
    behind += [[] for _ in range(len(prompt_ids) - len(branches))]
    layout = Layout.build(prompt_mask.bool(), behind, pad_token_id)
    last = prompt_ids.gather(1, prompt_mask.sum(dim=1, keepdim=True) - 1)[:, 0].tolist()
    responses = [branches[row][branch] for row, branch in places]
    starts = [[0, *itertools.accumulate(len(ids) for ids in row)] for row in branches]
    width = layout.input_ids.shape[1]
    index = [
        torch.arange(len(ids)) + row * width + starts[row][branch]
        for (row, branch), ids in zip(places, responses, strict=True)
    ]
    completions = [_ids([last[row], *ids]) for (row, _), ids in zip(places, responses, strict=True)]
    masks = [_ids([0] + [1] * len(ids)) for ids in responses]
    batch["input_ids"] = pad_sequence(completions, batch_first=True, padding_value=pad_token_id)
    batch["completion_mask"] = pad_sequence(masks, batch_first=True)
    batch["attention_mask"] = torch.cat((prompt_mask, layout.is_token.to(prompt_mask.dtype)), dim=1)
    batch["prompt_ids"] = prompt_ids
    batch[TOKEN_INDEX] = pad_sequence(index, batch_first=True)
    for field in fields(Layout):
        batch[LAYOUT_PREFIX + field.name] = getattr(layout, field.name)
    return batch


def without_corrupted(batch: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """A batch whose last `count` responses are those under corrupted pictures, which TRL does not see, apart.

    The model finds their tokens by names of their own: `CORRUPTED_INDEX` and `CORRUPTED_MASK` (count, C).
    """
    apart = dict(batch)
    apart[CORRUPTED_INDEX] = batch[TOKEN_INDEX][-count:]
    apart[CORRUPTED_MASK] = batch["completion_mask"][-count:, 1:].bool()
    for name in ("input_ids", "completion_mask", TOKEN_INDEX):
        apart[name] = batch[name][:-count]
    return apart


def layout_of(batch: dict[str, Any]) -> Layout:
    """The `Layout` that `shared_batch` put into a batch."""
    return Layout(**{field.name: batch[LAYOUT_PREFIX + field.name] for field in fields(Layout)})


def prompt_inputs_of(batch: dict[str, Any]) -> dict[str, Any]:
    """What the processor made of the prompts, from a batch of `shared_batch`."""
    ours = {"attention_mask", "completion_mask", "prompt_ids", *TRAINER_COLUMNS}
    inputs = {name: value for name, value in batch.items() if name not in ours and not name.startswith(LAYOUT_PREFIX)}
    return inputs | {
        "input_ids": batch["prompt_ids"],
        "attention_mask": batch[LAYOUT_PREFIX + "prompt_mask"].to(batch["prompt_ids"].dtype),
    }


def _blank_picture() -> Image.Image:
    return Image.new("RGB", (BLANK_PX, BLANK_PX))


def _ids(tokens: Sequence[int]) -> Tensor:
    return torch.tensor(tokens, dtype=torch.long)
