"""A model and tokenised pairs in; the log-probabilities of both responses of every pair out,
each question encoded once.

All responses of a question stand behind one prompt, in the layout, the dtype and the code that training uses.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from align.dpo.collator import LayoutName, PairCollator
from align.dpo.rows import by_question
from align.dpo.shared_forward import log_prob_head
from align.dpo.tokenize import TokenizedPair
from align.monitoring.cost import count_tokens
from align.monitoring.progress import progress
from align.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Autocast = Callable[[], AbstractContextManager[Any]]


class ReferenceLine(Record):
    """Finished work: per-token log-probabilities as base64 of little-endian float32, and their sums.

    `corrupted`: the sum over the chosen response under the corrupted picture, where one is asked for.
    """

    id: str
    chosen: str
    rejected: str
    logps: tuple[float, float]
    corrupted: float | None = None


def group_by_question(pairs: Sequence[TokenizedPair], layout: LayoutName) -> list[list[TokenizedPair]]:
    """Pairs with the same prompt and images together, in order; one by one where prompts are not shared."""
    if layout == "plain":
        return [[pair] for pair in pairs]
    return [[pairs[index] for index in group] for group in by_question(pairs)]


@dataclass(frozen=True)
class GroupBatch:
    """The pairs of some questions, collated."""

    pairs: list[TokenizedPair]
    num_questions: int
    inputs: dict[str, Tensor]


class GroupBatches(Dataset[GroupBatch]):
    """Questions, `batch_size` at a time, collated when asked for: in the workers of a loader, while the GPU computes.

    A response that stands in several pairs is computed once.
    """

    def __init__(self, groups: list[list[TokenizedPair]], collator: PairCollator, batch_size: int) -> None:
        self.batches = [groups[start : start + batch_size] for start in range(0, len(groups), batch_size)]
        self.num_own = len(self.batches)
        self.collator = replace(collator, grouping="question")

    def add_dummy_batches(self, groups: list[list[TokenizedPair]], num_batches: int) -> None:
        """Batches of `groups` behind its own until there are `num_batches`, so that collectives match; not kept."""
        self.batches += [groups] * (num_batches - self.num_own)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> GroupBatch:
        groups = self.batches[index]
        pairs = [pair for group in groups for pair in group]
        return GroupBatch(pairs, len(groups), self.collator.collate(pairs))


def compute_log_probs(
    model: PreTrainedModel,
    batches: GroupBatches,
    on_line: Callable[[ReferenceLine], None],
    autocast: Autocast,
    num_workers: int,
) -> None:
    """Hand every pair's log-probabilities to `on_line` as soon as they are there; those of dummy batches are not."""
    was_training = model.training
    model.eval()
    loader = DataLoader(batches, batch_size=None, num_workers=num_workers)
    own = batches.batches[: batches.num_own]
    with (
        log_prob_head(model, shared=batches.collator.layout == "shared"),
        torch.no_grad(),
        progress("reference log-probabilities", total=sum(map(len, own))) as advance,
    ):
        for index, batch in enumerate(loader):
            lines = list(group_log_probs(model, batch, autocast))
            count_tokens(read=int(batch.inputs["attention_mask"].sum()))
            if index < batches.num_own:
                for line in lines:
                    on_line(line)
                advance(batch.num_questions)
    model.train(was_training)


def group_log_probs(model: PreTrainedModel, batch: GroupBatch, autocast: Autocast) -> Iterator[ReferenceLine]:
    """Every pair of the questions with the log-probabilities of its two responses, from one forward."""
    per_token, sums, corrupted = response_log_probs(model, batch.inputs, autocast)
    for chosen, pair in enumerate(batch.pairs):
        rejected = len(batch.pairs) + chosen
        yield ReferenceLine(
            id=pair.id,
            chosen=pack(per_token[chosen, : len(pair.chosen_ids)]),
            rejected=pack(per_token[rejected, : len(pair.rejected_ids)]),
            logps=(float(sums[chosen]), float(sums[rejected])),
            corrupted=None if corrupted is None else float(corrupted[chosen]),
        )


def response_log_probs(
    model: PreTrainedModel, batch: dict[str, Tensor], autocast: Autocast
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(R, C) log-probabilities of the responses' tokens, each from the start of its row, and (R,) their sums.

    Then (n,) the sums of the chosen responses under corrupted pictures, where the batch has some.

    The sums are those of the rows as they come out of the model, as in TRL's loss: another order of summation would
    change their last bit.
    """
    batch = {name: value.to(model.device) for name, value in batch.items()}
    mask = batch.pop("completion_mask")
    labels = batch["input_ids"].masked_fill(mask == 0, -100)
    with autocast():
        output = model(**batch, labels=labels, use_cache=False, fused_lm_head=True)
    log_probs = output.log_probs
    # In the plain layout the response stands behind its prompt.
    start = mask[:, 1:].argmax(dim=1)
    width = int(mask.sum(dim=1).max())
    index = (start[:, None] + torch.arange(width, device=start.device)).clamp(max=log_probs.shape[1] - 1)
    return log_probs.gather(1, index), log_probs.sum(dim=1), getattr(output, "corrupted_logps", None)


def pack(values: Tensor) -> str:
    """Numbers as base64 of little-endian float32."""
    return base64.b64encode(values.float().cpu().numpy().astype("<f4").tobytes()).decode()


def unpack(text: str) -> Tensor:
    """The numbers of `pack`, float32."""
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float32))
