"""Pictures with several texts about each in, training rows out: the picture once, every text a branch behind it.

A branch sees the picture and itself only, and its positions go on from the picture, so a row teaches what its texts
would teach one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

IGNORED = -100
#: Visual tokens of one 112x112 picture: thumbnail, one tile, and the second encoder, 4x4 each.
NUM_IMAGE_TOKENS = 48
OPENING = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<im_start>"
CLOSING = "<im_end>\n"
TURN = "<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"


@dataclass(frozen=True)
class Branch:
    """Token ids behind the picture, and which of them are learned.

    `p_first` is set where the last token is a verdict: how sure it ought to be of "first". `known` says by places in
    `ids` what should be known there, 0 to 1: whether this word is right, and behind a response how good it was.
    """

    ids: tuple[int, ...]
    learned: tuple[bool, ...]
    p_first: float | None = None
    known: tuple[tuple[int, float], ...] = ()


@dataclass
class Rows:
    """`pixels (B, 112, 112) uint8`, `ids`, `positions`, `labels` `(B, L) int64`, `branch (B, L) int64`.

    `branch` is 0 on the shared part, n on the n-th text, -1 on padding. `p_first` and `known` `(B, L) float32` are a
    branch's where it has them and NaN elsewhere.
    """

    pixels: np.ndarray
    ids: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    branch: torch.Tensor
    p_first: torch.Tensor
    known: torch.Tensor


class RowMaker:
    """Turns texts into rows with one tokenizer; each piece is tokenised by itself, as the engines do."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self._encoded: dict[str, list[int]] = {}
        image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self.shared = [*self.encode(OPENING), *[image] * NUM_IMAGE_TOKENS, *self.encode(CLOSING)]
        self.pad = tokenizer.pad_token_id

    def knows(self, text: str) -> bool:
        """Whether a text says anything, and only in words of the vocabulary."""
        return bool(text.strip()) and self.tokenizer.unk_token_id not in self.tokenizer(text)["input_ids"]

    def encode(self, text: str) -> list[int]:
        if text not in self._encoded:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            assert self.tokenizer.unk_token_id not in ids, f"not in the vocabulary: {text!r}"
            self._encoded[text] = ids
        return self._encoded[text]

    def branch(self, pieces: Sequence[str], answer: str, *, closed: bool = True) -> Branch:
        """A user turn in pieces and the answer that is learned, with the end of the turn if `closed`."""
        asked = [token for piece in (*pieces, TURN) for token in self.encode(piece)]
        said = self.encode(answer + END) if closed else self.encode(answer)
        return Branch((*asked, *said), (False,) * len(asked) + (True,) * len(said))

    def rows(self, pixels: np.ndarray, branches: Sequence[Sequence[Branch]]) -> Rows:
        length = len(self.shared) + max(sum(len(branch.ids) for branch in row) for row in branches)
        shape = (len(branches), length)
        ids, labels = np.full(shape, self.pad), np.full(shape, IGNORED)
        positions, owner = np.zeros(shape, dtype=np.int64), np.full(shape, -1)
        p_first, known = (np.full(shape, np.nan, dtype=np.float32) for _ in range(2))
        for b, row in enumerate(branches):
            at = len(self.shared)
            ids[b, :at], positions[b, :at], owner[b, :at] = self.shared, np.arange(at), 0
            for number, branch in enumerate(row, start=1):
                here = slice(at, at + len(branch.ids))
                ids[b, here], owner[b, here] = branch.ids, number
                labels[b, here] = np.where(branch.learned, branch.ids, IGNORED)
                positions[b, here] = len(self.shared) + np.arange(len(branch.ids))
                for place, value in branch.known:
                    known[b, at + place] = value
                at += len(branch.ids)
                if branch.p_first is not None:
                    p_first[b, at - 1] = branch.p_first
        tensors = (torch.from_numpy(array.astype(np.int64)) for array in (ids, positions, labels, owner))
        return Rows(pixels, *tensors, torch.from_numpy(p_first), torch.from_numpy(known))
