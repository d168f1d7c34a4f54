"""Log-probabilities of all responses under the reference policy: computed once per round, kept in the round's folder.

All responses of a question stand behind one prompt, in the layout, the dtype and the code that training uses, so that
the first step of training finds the same numbers. With one pair per batch they are the same to the last bit, in float32
and in bfloat16: the loss is ln 2 and the rewards are 0. Batches of several pairs are padded differently: sums then
differ by their rounding, in float32 by some 1e-6, in bfloat16 so that rewards (beta 0.1) were up to 0.002 on a small
random model.

``reference.safetensors`` holds per-token and summed values, and in its header the key: hashes of everything that the
numbers depend on, and a checksum. A file with another key, or a damaged one, is not used. Unfinished work lies beside
it, line by line, and is continued.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from align.dpo.collator import PairCollator
from align.dpo.reference_pass import Autocast, GroupBatches, ReferenceLine, compute_log_probs, group_by_question, unpack
from align.dpo.sharding.shards import gathered_as_needed
from align.dpo.tokenize import TokenizedPair
from align.files import write_text
from align.log import log
from align.media.images import ImageStore
from align.run.hashes import text_hash
from align.run.resumable import PartialFile

# Raised whenever the numbers may come out differently for the same inputs.
CODE_VERSION = "3"


@dataclass(frozen=True)
class ReferenceKey:
    """Everything that reference log-probabilities depend on, as hashes and names.

    `weights` and `processor` are hashes of the reference checkpoint and of the processor with its settings; `pairs`
    covers prompts, token ids and the contents of the images; `arithmetic` is the dtype of the weights and,
    behind a slash, of autocast; `corruption` says what pictures were corrupted into, where they were.
    """

    weights: str
    processor: str
    pairs: str
    layout: str
    arithmetic: str
    max_length: str
    code: str = CODE_VERSION
    corruption: str = ""

    def changes(self, stored: dict[str, str]) -> list[str]:
        """The names of what differs from a stored key."""
        return [name for name, value in asdict(self).items() if stored.get(name) != value]


@dataclass(frozen=True)
class Reference:
    """Log-probabilities of n pairs under the reference; all natural logarithms in float32.

    `logps` (n, 2): sums over the tokens of chosen and rejected. `chosen`, `rejected`: one tensor per pair, per token.
    `corrupted` (n,): sums over the chosen response under the corrupted picture, where they were asked for.
    """

    logps: Tensor
    chosen: list[Tensor]
    rejected: list[Tensor]
    corrupted: Tensor | None = None

    def columns(self, ld_alpha: float | None = None) -> list[tuple[float, float]]:
        """What the dataset carries for every pair.

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


def pairs_hash(pairs: Sequence[TokenizedPair], images: ImageStore) -> str:
    """A hash of what the model is asked, the contents of its images included, and answers."""
    parts = []
    for pair in pairs:
        contents = [images.sha256(reference) for reference in pair.image_files]
        parts.append(json.dumps([pair.id, pair.prompt, pair.chosen_ids, pair.rejected_ids, pair.image_files, contents]))
    return text_hash(*parts)


def reference_log_probs(
    path: Path,
    key: ReferenceKey,
    pairs: Sequence[TokenizedPair],
    *,
    collator: PairCollator,
    load_model: Callable[[], Any],
    autocast: Autocast,
    batch_size: int,
    state: PartialState,
    num_workers: int = 0,
) -> Reference:
    """The stored values when they were computed for `key`; otherwise computed with the model, stored and returned.

    `load_model` is called only when something is to be computed; its model must be on its device, or sharded over
    those of all processes (`align.dpo.sharding.shards`). Every process takes a share of the questions, `batch_size` at
    a time, collated by `num_workers` of its own. What had been computed for another key is discarded, with a line in
    the log that names what has changed.
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
    groups = group_by_question(pairs, collator.layout)
    todo = [group for group in groups if not all(pair.id in done for pair in group)]
    # Nobody appends before everybody has read: the shares would be cut from different lists.
    state.wait_for_everyone()
    if todo:
        model = load_model()
        batches = GroupBatches(todo[state.process_index :: state.num_processes], collator, batch_size)
        if is_deepspeed_zero3_enabled():
            # Shards are exchanged in every forward: who has fewer questions runs dummy batches beside the others.
            longest = len(todo[:: state.num_processes])
            batches.add_dummy_batches(todo[:1], math.ceil(longest / batch_size))
        with gathered_as_needed(model):
            compute_log_probs(model, batches, part.append, autocast, num_workers)
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
    """The file's values, or None when there is no file, it is damaged, or it was computed for something else."""
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        changed = key.changes(json.loads(metadata.get("key", "{}")))
    except (SafetensorError, OSError, ValueError, AttributeError):
        log.warning("reference log-probabilities: %s is damaged, they are computed again", path)
        return None
    if changed:
        log.warning("reference log-probabilities: %s changed since they were stored", ", ".join(changed))
        return None
    if metadata.get("sha256") != _digest(tensors):
        log.warning("reference log-probabilities: %s is damaged, they are computed again", path)
        return None
    tokens = {
        side: list(tensors[f"{side}_per_token_logps"].split(tensors[f"{side}_num_tokens"].tolist()))
        for side in ("chosen", "rejected")
    }
    return Reference(tensors["logps"], tokens["chosen"], tokens["rejected"], tensors.get("corrupted_logps"))


def _begin(path: Path, key: ReferenceKey, part: PartialFile) -> None:
    """Take up unfinished work for the same key; discard work for another one."""
    stored = _key_path(path)
    if stored.is_file():
        try:
            changed = key.changes(json.loads(stored.read_text(encoding="utf-8")))
        except (ValueError, AttributeError):
            changed = [f"{stored.name}, which is damaged,"]
        if changed:
            log.warning("reference log-probabilities: restarted, %s changed", ", ".join(changed))
            part.discard()
    write_text(stored, json.dumps(asdict(key)))


def _write(path: Path, key: ReferenceKey, lines: dict[str, ReferenceLine], pairs: Sequence[TokenizedPair]) -> None:
    ordered = [lines[pair.id] for pair in pairs]
    tensors = {"logps": torch.tensor([line.logps for line in ordered], dtype=torch.float32)}
    if all(line.corrupted is not None for line in ordered):
        tensors["corrupted_logps"] = torch.tensor([line.corrupted for line in ordered], dtype=torch.float32)
    for side in ("chosen", "rejected"):
        values = [unpack(getattr(line, side)) for line in ordered]
        tensors[f"{side}_num_tokens"] = torch.tensor([len(value) for value in values])
        tensors[f"{side}_per_token_logps"] = torch.cat(values)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(tensors, str(temporary), metadata={"key": json.dumps(asdict(key)), "sha256": _digest(tensors)})
    temporary.replace(path)


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)} ".encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _key_path(path: Path) -> Path:
    return path.with_name("reference.json")
