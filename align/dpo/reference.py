"""Log-probabilities of all responses under the reference policy: computed once a round, kept in the round's folder.

All responses of a question stand behind one prompt, in the layout, the dtype and the code that training uses, so that
the first step of training finds the same numbers. With one pair a batch they are the same to the last bit, in float32
and in bfloat16: the loss is ln 2 and the rewards are 0. Batches of several pairs are padded differently: sums then
differ by their rounding, in float32 by some 1e-6, in bfloat16 so that rewards (beta 0.1) were up to 0.002 on a small
random model.

``reference.safetensors`` holds per-token and summed values, and in its header the key: hashes of everything that the
numbers depend on. A file with another key is not used. Unfinished work lies beside it, line by line, and is continued.
"""

from __future__ import annotations

import base64
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from align.dpo.collator import PairCollator
from align.dpo.sharding.shards import gathered_as_needed
from align.dpo.shared_forward import log_prob_head
from align.dpo.tokenize import PairTokens, encode_responses, render_pair
from align.files import write_text
from align.media.images import ImageStore
from align.monitoring.cost import count_tokens
from align.monitoring.progress import progress
from align.records import Pair, Record
from align.run.hashes import text_hash
from align.run.resumable import PartialFile

log = logging.getLogger("align")

# Raised whenever the numbers may come out differently for the same inputs.
CODE_VERSION = "2"


@dataclass(frozen=True)
class ReferenceKey:
    """Everything that reference log-probabilities depend on, as hashes and names.

    `weights` and `processor` are hashes of the reference checkpoint and of the processor with its settings; `pairs`
    covers prompts, responses and the images' names and sizes in bytes; `arithmetic` is the dtype of the weights and,
    behind a slash, of autocast.
    """

    weights: str
    processor: str
    pairs: str
    layout: str
    arithmetic: str
    max_length: str
    code: str = CODE_VERSION

    def changes(self, stored: dict[str, str]) -> list[str]:
        """The names of what differs from a stored key."""
        return [name for name, value in asdict(self).items() if stored.get(name) != value]


class ReferenceLine(Record):
    """Finished work: per-token log-probabilities as base64 of little-endian float32, and their sums."""

    id: str
    chosen: str
    rejected: str
    logps: tuple[float, float]


@dataclass(frozen=True)
class Reference:
    """Log-probabilities of n pairs under the reference; all natural logarithms in float32.

    `logps` (n, 2): sums over the tokens of chosen and rejected. `chosen`, `rejected`: one tensor a pair, per token.
    """

    logps: Tensor
    chosen: list[Tensor]
    rejected: list[Tensor]

    def columns(self, ld_alpha: float | None = None) -> list[tuple[float, float]]:
        """What the data set carries for every pair.

        With `ld_alpha`, tokens beyond the shorter response of the pair count that much (LD-DPO, arXiv 2409.06411).
        """
        if ld_alpha is None:
            return [(chosen, rejected) for chosen, rejected in self.logps.tolist()]
        columns = []
        for chosen, rejected in zip(self.chosen, self.rejected, strict=True):
            shared = min(len(chosen), len(rejected))
            columns.append(
                tuple(float(x[:shared].sum() + ld_alpha * x[shared:].sum()) for x in (chosen, rejected)),
            )
        return columns  # type: ignore[return-value]


def pairs_hash(pairs: Sequence[Pair], images: ImageStore) -> str:
    """A hash of what the model is asked, the contents of its images included, and answers."""
    parts = []
    for pair in pairs:
        contents = [images.sha256(reference) for reference in pair.images]
        parts.append(json.dumps([pair.id, pair.prompt, pair.chosen, pair.rejected, pair.images, contents]))
    return text_hash(*parts)


def reference_log_probs(
    path: Path,
    key: ReferenceKey,
    pairs: Sequence[Pair],
    *,
    collator: PairCollator,
    load_model: Callable[[], Any],
    autocast: Callable[[], AbstractContextManager[Any]],
    batch_size: int,
    state: PartialState,
    num_workers: int = 0,
) -> Reference:
    """The stored values when they were computed for `key`; otherwise computed with the model, stored and returned.

    `load_model` is called only when something is to be computed; its model must be on its device, or in pieces on those
    of all processes (`align.dpo.sharding.shards`). Every process takes a share of the questions, `batch_size` at a time, collated
    by `num_workers` of its own. What had been computed for another key is discarded, with a line in the log that names
    what has changed.
    """
    stored = read_reference(path, key)
    if stored is not None:
        if state.is_main_process:
            log.info("reference log-probabilities: those of %s are used again", path)
        return stored
    part = PartialFile(path.with_name("reference.jsonl"), ReferenceLine, state.process_index)
    if state.is_main_process:
        _begin(path, key, part)
    state.wait_for_everyone()
    done = set(part.read())
    groups = group_by_question(pairs, collator)
    todo = [group for group in groups if not all(pair.id in done for pair in group)]
    # Nobody appends before everybody has read: the shares would be cut from different lists.
    state.wait_for_everyone()
    if todo:
        model = load_model()
        batches = GroupBatches(todo[state.process_index :: state.num_processes], collator, batch_size)
        if is_deepspeed_zero3_enabled():
            # Pieces of weights are exchanged in every forward: who has fewer questions keeps the others company.
            longest = len(todo[:: state.num_processes])
            batches.add_company(todo[:1], math.ceil(longest / batch_size))
        with gathered_as_needed(model):
            _compute(model, batches, part, autocast, num_workers)
    state.wait_for_everyone()
    if state.is_main_process:
        _write(path, key, part.read(), pairs)
        part.discard()
        _key_path(path).unlink(missing_ok=True)
    state.wait_for_everyone()
    result = read_reference(path, key)
    assert result is not None
    return result


def read_reference(path: Path, key: ReferenceKey) -> Reference | None:
    """The file's values, or None when there is no file or it was computed for something else."""
    if not path.is_file():
        return None
    with safe_open(str(path), framework="pt") as file:
        changed = key.changes(json.loads((file.metadata() or {}).get("key", "{}")))
        if changed:
            log.warning("reference log-probabilities: %s changed since they were stored", ", ".join(changed))
            return None
        lengths = {side: file.get_tensor(f"{side}_num_tokens").tolist() for side in ("chosen", "rejected")}
        tokens = {side: file.get_tensor(f"{side}_per_token_logps").split(lengths[side]) for side in lengths}
        return Reference(file.get_tensor("logps"), list(tokens["chosen"]), list(tokens["rejected"]))


def group_by_question(pairs: Sequence[Pair], collator: PairCollator) -> list[list[Pair]]:
    """Pairs with the same prompt and images together, in order; one by one where prompts are not shared."""
    if collator.layout == "plain":
        return [[pair] for pair in pairs]
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(json.dumps([pair.prompt, pair.images]), []).append(pair)
    return list(groups.values())


def _begin(path: Path, key: ReferenceKey, part: PartialFile) -> None:
    """Take up unfinished work for the same key; discard work for another one."""
    stored = _key_path(path)
    if stored.is_file():
        changed = key.changes(json.loads(stored.read_text(encoding="utf-8")))
        if changed:
            log.warning("reference log-probabilities: begun anew, %s changed", ", ".join(changed))
            part.discard()
    write_text(stored, json.dumps(asdict(key)))


@dataclass(frozen=True)
class GroupBatch:
    """Some questions with all their responses, collated.

    `distinct[b]` are the different responses of question b, each computed once; `tokens[b]` those of its pairs.
    """

    groups: list[list[Pair]]
    tokens: list[list[PairTokens]]
    distinct: list[list[tuple[int, ...]]]
    inputs: dict[str, Tensor]


class GroupBatches(Dataset[GroupBatch]):
    """Questions, `batch_size` at a time, collated when asked for: in the workers of a loader, while the GPU computes."""

    def __init__(self, groups: list[list[Pair]], collator: PairCollator, batch_size: int) -> None:
        self.batches = [groups[start : start + batch_size] for start in range(0, len(groups), batch_size)]
        self.num_own = len(self.batches)
        self.collator = collator

    def add_company(self, groups: list[list[Pair]], num_batches: int) -> None:
        """Batches of `groups` behind its own until there are `num_batches`; nothing of theirs is kept."""
        self.batches += [groups] * (num_batches - self.num_own)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> GroupBatch:
        prompts, tokens, distinct = [], [], []
        for group in self.batches[index]:
            rendered = [render_pair(pair, self.collator.processor) for pair in group]
            prompts.append(rendered[0].prompt)
            tokens.append(
                [
                    encode_responses(text, self.collator.processor, f"pair {pair.id}")
                    for text, pair in zip(rendered, group, strict=True)
                ]
            )
            # A response that stands in several pairs is computed once; a dict keeps their order.
            distinct.append(list(dict.fromkeys(tuple(ids) for pair_tokens in tokens[-1] for ids in pair_tokens)))
        count = max(len(responses) for responses in distinct)
        columns = [[responses[k] if k < len(responses) else () for responses in distinct] for k in range(count)]
        inputs = self.collator.batch(prompts, [group[0].images for group in self.batches[index]], columns)
        return GroupBatch(self.batches[index], tokens, distinct, inputs)


def _compute(
    model: Any,
    batches: GroupBatches,
    part: PartialFile,
    autocast: Callable[[], AbstractContextManager[Any]],
    num_workers: int,
) -> None:
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
                    part.append(line)
                advance(len(batch.groups))
    model.train(was_training)


def group_log_probs(
    model: Any, batch: GroupBatch, autocast: Callable[[], AbstractContextManager[Any]]
) -> Iterator[ReferenceLine]:
    """Every pair of the questions with the log-probabilities of its two responses, from one forward."""
    per_token, sums = _forward(model, batch.inputs, autocast)
    for b, group in enumerate(batch.groups):
        row = {ids: k * len(batch.groups) + b for k, ids in enumerate(batch.distinct[b])}
        for pair, tokens in zip(group, batch.tokens[b], strict=True):
            chosen, rejected = (row[tuple(ids)] for ids in tokens)
            yield ReferenceLine(
                id=pair.id,
                chosen=_pack(per_token[chosen, : len(tokens.chosen)]),
                rejected=_pack(per_token[rejected, : len(tokens.rejected)]),
                logps=(float(sums[chosen]), float(sums[rejected])),
            )


def _forward(
    model: Any, batch: dict[str, Tensor], autocast: Callable[[], AbstractContextManager[Any]]
) -> tuple[Tensor, Tensor]:
    """(K n, C) log-probabilities of the responses' tokens, each from the start of its row, and (K n,) their sums.

    The sums are those of the rows as they come out of the model, as in TRL's loss: another order of summation would
    change their last bit.
    """
    batch = {name: value.to(model.device) for name, value in batch.items()}
    mask = batch.pop("completion_mask")
    labels = batch["input_ids"].masked_fill(mask == 0, -100)
    with autocast():
        log_probs = model(**batch, labels=labels, use_cache=False, fused_lm_head=True).log_probs
    # In the plain layout the response stands behind its prompt.
    start = mask[:, 1:].argmax(dim=1)
    width = int(mask.sum(dim=1).max())
    index = (start[:, None] + torch.arange(width, device=start.device)).clamp(max=log_probs.shape[1] - 1)
    return log_probs.gather(1, index), log_probs.sum(dim=1)


def _write(path: Path, key: ReferenceKey, lines: dict[str, ReferenceLine], pairs: Sequence[Pair]) -> None:
    ordered = [lines[pair.id] for pair in pairs]
    tensors = {"logps": torch.tensor([line.logps for line in ordered], dtype=torch.float32)}
    for side in ("chosen", "rejected"):
        values = [_unpack(getattr(line, side)) for line in ordered]
        tensors[f"{side}_num_tokens"] = torch.tensor([len(value) for value in values])
        tensors[f"{side}_per_token_logps"] = torch.cat(values)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(tensors, str(temporary), metadata={"key": json.dumps(asdict(key))})
    temporary.replace(path)


def _key_path(path: Path) -> Path:
    return path.with_name("reference.json")


def _pack(values: Tensor) -> str:
    return base64.b64encode(values.float().cpu().numpy().astype("<f4").tobytes()).decode()


def _unpack(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float32))
