"""Prompts and the trees of segments behind them in; token ids, positions, predictors and visibility out.

A row is `[prompt | segment 1 | segment 2 | ...]`. Every segment has a parent, which is the prompt or an earlier
segment of its row. A token sees the prompt, the segments above its own, and its own segment up to itself. Two children
of the prompt are a chosen and a rejected response; a segment below a segment is a second response being compared with
a first one. What the prompts themselves contain (images, text) is no concern of this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

PADDING = -1


@dataclass(frozen=True)
class Segment:
    """Tokens that stand together behind `parent`: the index of an earlier segment of the row, None for the prompt."""

    token_ids: Sequence[int]
    parent: int | None = None


@dataclass
class Layout:
    """Everything about the part of a batch of rows that stands behind the prompts; all tensors on one device.

    `prompt_mask` `(B, P)` bool, True on real prompt tokens; prompts are right-padded and not empty.
    `input_ids` `(B, S)` int64, the segments of a row one after the other, right-padded.
    `segment` `(B, S)` int64, the index of a token's segment, -1 on padding.
    `path_position` `(B, S)` int64, how many tokens of its own path lie between the prompt and the token.
    `predicted_at` `(B, S)` int64, where in the row `[prompt (P) | segments (S)]` the token is predicted: the last real
    token of the prompt, the last token of the parent, or the token before. 0 on padding.
    `last` `(B, N)` int64, where in the row a segment ends: its last token, or for an empty segment what stands above.
    `ancestors` `(B, N, N)` bool, True at `[b, i, j]` where segment j is segment i or stands above it.

    A prompt of two tokens (padded to three) with two answers, the second of which is continued:

    >>> mask = torch.tensor([[True, True, False]])
    >>> rows = [[Segment([5, 6]), Segment([7]), Segment([8, 9], parent=1)]]
    >>> layout = Layout.build(mask, rows, pad_token_id=0)
    >>> layout.input_ids.tolist(), layout.segment.tolist()
    ([[5, 6, 7, 8, 9]], [[0, 0, 1, 2, 2]])
    >>> layout.path_position.tolist(), layout.predicted_at.tolist()
    ([[0, 1, 0, 1, 2]], [[1, 3, 1, 5, 6]])
    >>> layout.last.tolist()
    [[4, 5, 7]]
    >>> for visible in layout.mask()[0, 0].int().tolist():
    ...     print(visible[:3], visible[3:])
    [1, 1, 0] [1, 0, 0, 0, 0]
    [1, 1, 0] [1, 1, 0, 0, 0]
    [1, 1, 0] [0, 0, 1, 0, 0]
    [1, 1, 0] [0, 0, 1, 1, 0]
    [1, 1, 0] [0, 0, 1, 1, 1]
    """

    prompt_mask: Tensor
    input_ids: Tensor
    segment: Tensor
    path_position: Tensor
    predicted_at: Tensor
    last: Tensor
    ancestors: Tensor

    @classmethod
    def build(cls, prompt_mask: Tensor, rows: Sequence[Sequence[Segment]], pad_token_id: int) -> Layout:
        """Lay out one list of segments a row. The result is on the device of `prompt_mask`.

        `prompt_mask` `(B, P)` is the processor's attention mask. Raises ValueError where a parent does not come
        before its child, or the prompts are not right-padded.
        """
        prompt_mask = prompt_mask.bool()
        if len(rows) != len(prompt_mask):
            raise ValueError(f"{len(prompt_mask)} prompts but {len(rows)} rows of segments")
        prompt_lengths = prompt_mask.sum(dim=1).tolist()
        if not prompt_mask[:, 0].all() or (prompt_mask[:, 1:] & ~prompt_mask[:, :-1]).any():
            raise ValueError("prompts must be right-padded and not empty")
        width = max((sum(len(segment.token_ids) for segment in row) for row in rows), default=0)
        num_segments = max((len(row) for row in rows), default=0)
        shape = (len(rows), width)
        input_ids = torch.full(shape, pad_token_id)
        segment_of = torch.full(shape, PADDING)
        path_position = torch.zeros(shape, dtype=torch.int64)
        predicted_at = torch.zeros(shape, dtype=torch.int64)
        last = torch.zeros(len(rows), num_segments, dtype=torch.int64)
        ancestors = torch.eye(num_segments, dtype=torch.bool).repeat(len(rows), 1, 1)
        for b, row in enumerate(rows):
            start = 0
            # Per segment: the depth at which a child begins, and the index in the row that predicts its first token.
            ends: list[tuple[int, int]] = []
            for index, segment in enumerate(row):
                depth, predictor = 0, prompt_lengths[b] - 1
                if segment.parent is not None:
                    if not 0 <= segment.parent < index:
                        raise ValueError(f"segment {index} of row {b} has parent {segment.parent}")
                    depth, predictor = ends[segment.parent]
                    ancestors[b, index] |= ancestors[b, segment.parent]
                length = len(segment.token_ids)
                if length:
                    at = slice(start, start + length)
                    first = prompt_mask.shape[1] + start
                    input_ids[b, at] = torch.as_tensor(segment.token_ids, dtype=torch.int64)
                    segment_of[b, at] = index
                    path_position[b, at] = torch.arange(depth, depth + length)
                    predicted_at[b, at] = torch.arange(first - 1, first - 1 + length)
                    predicted_at[b, start] = predictor
                    depth, predictor = depth + length, first + length - 1
                ends.append((depth, predictor))
                last[b, index] = predictor
                start += length
        layout = cls(prompt_mask, input_ids, segment_of, path_position, predicted_at, last, ancestors)
        return layout.to(prompt_mask.device)

    def to(self, device: torch.device | str) -> Layout:
        """The same layout on another device."""
        return Layout(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    @property
    def is_token(self) -> Tensor:
        """`(B, S)` bool, False on padding."""
        return self.segment != PADDING

    @property
    def prompt_lengths(self) -> Tensor:
        """`(B,)` int64, real tokens of every prompt."""
        return self.prompt_mask.sum(dim=1)

    @property
    def read_at(self) -> Tensor:
        """`(B, 1 + S)` int64: the last real token of the prompt and all behind it, the only places that predict any."""
        width, length = self.prompt_mask.shape[1], self.input_ids.shape[1]
        segments = torch.arange(width, width + length, device=self.prompt_mask.device).expand(len(self.input_ids), -1)
        return torch.cat([self.prompt_lengths[:, None] - 1, segments], dim=1)

    def mask(self) -> Tensor:
        """`(B, 1, S, P + S)` bool: what a segment token may see. Padding sees the prompt, so that no row is empty."""
        prompt = self.prompt_mask[:, None, :].expand(-1, self.segment.shape[1], -1)
        return torch.cat([prompt, visibility_mask(self.ancestors, self.segment, self.path_position)], dim=2)[:, None]


def visibility_mask(ancestors: Tensor, segment: Tensor, path_position: Tensor) -> Tensor:
    """Which segment tokens may see which: `(..., S, S)` bool, for `segment` and `path_position` `(B, ..., S)`.

    A token sees what stands earlier on its own path, and itself; padding sees and is seen by nothing.
    """
    if ancestors.shape[1] == 0:
        return segment.new_zeros(*segment.shape, segment.shape[-1], dtype=torch.bool)
    of = segment.clamp(min=0)
    rows = torch.arange(len(of), device=of.device).view(-1, *[1] * of.ndim)
    related = ancestors[rows, of[..., :, None], of[..., None, :]]
    earlier = path_position[..., None, :] <= path_position[..., :, None]
    real = segment != PADDING
    return related & earlier & real[..., :, None] & real[..., None, :]
