"""A layout in; what the layers need to compute attention for one forward out.

Two ways for the tokens behind the prompt, by what computes fewer scores: one call under one mask, or the segments below
each child of the prompt as a batch entry of their own. A fused kernel for CUDA would be a third class here.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from align.prefix.layout import PADDING, Layout, visibility_mask

# Query heads on one key head, above which backward is faster with repeated keys on a CPU.
MAX_FOLDED_WITH_GRADIENTS = 4


class AttentionPlan:
    """What the layers of one forward receive in place of a mask.

    `prompt_width` P: the first P queries are prompt tokens, causal among themselves; 0 where the prompt's keys
    come from a cache. `mask` `(B, 1, Q, K)` bool: what the remaining Q queries see of all K keys; None without such
    queries. `read_at` `(B, R)` int64: the places of the row whose last hidden state is read, each once; None for all.
    `num_calls` counts the layers that asked, so that a model with other than attention layers is noticed.
    """

    def __init__(self, prompt_width: int, mask: Tensor | None, read_at: Tensor | None = None) -> None:
        self.prompt_width = prompt_width
        self.mask = mask
        self.read_at = read_at
        self.num_keys = prompt_width if mask is None else mask.shape[3]
        self.num_queries = prompt_width + (0 if mask is None else mask.shape[2])
        self.num_calls = 0
        self._biases: dict[tuple[torch.dtype, torch.device, int], Tensor] = {}

    def bias(self, like: Tensor, copies: int = 1) -> Tensor:
        """The mask as 0 and -inf, `(B, 1, copies * Q, K)`, the queries' rows so many times one after the other.

        Made once a forward: SDPA would otherwise convert the bool mask in every layer.
        """
        assert self.mask is not None
        key = (like.dtype, like.device, copies)
        if key not in self._biases:
            mask = self.mask.to(like.device)
            bias = torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill_(~mask, float("-inf"))
            self._biases[key] = bias.repeat(1, 1, copies, 1) if copies > 1 else bias
        return self._biases[key]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, dropout: float) -> Tensor:
        """`(B, heads, Q, D)` for the queries behind the prompt: the one place where another kernel would be chosen."""
        return self._masked(query, key, value, scale=scale, dropout=dropout)

    def _masked(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, dropout: float) -> Tensor:
        """SDPA under the mask. Queries that share a key head stand one after the other as queries of one head.

        So keys are not repeated, and kernels that know no grouped queries can be used. Measured on one CPU thread,
        growing 4 rows of 5 branches over 1200 keys, 4 heads on 2: 0.56 ms so, 0.86 with `enable_gqa`, 1.5 with
        repeated keys; 28 heads on 4 of width 128, 1500 keys: 5.5, 7.2, 59. With gradients 2 x 120 tokens behind 1000
        take 9.4, 9.1 and 10.0 ms; with 8 heads on 1 24, 29 and 18 (two threads), so there keys are repeated.
        """
        groups = query.shape[1] // key.shape[1]
        if groups > MAX_FOLDED_WITH_GRADIENTS and query.requires_grad and not query.is_cuda:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
            groups = 1
        folded = query.reshape(len(query), key.shape[1], groups * query.shape[2], query.shape[3])
        out = scaled_dot_product_attention(
            folded, key, value, attn_mask=self.bias(query, groups), dropout_p=dropout, scale=scale
        )
        return out.reshape(*query.shape[:3], out.shape[-1])


class GroupedPlan(AttentionPlan):
    """Whole rows, where each child of the prompt, with all below it, is a batch entry of its own.

    The prompt's keys are copied for each of the G groups; in return no group computes scores for the keys of the
    others. `index` `(B, G, T)`: which segment tokens a group has, in order; `place` `(B, S)`: where a segment token
    stands among its row's `G * T`.
    """

    def __init__(self, layout: Layout) -> None:
        groups = _top_segment(layout)
        num_groups = int(groups.max()) + 1
        in_group = groups[:, :, None] == torch.arange(num_groups, device=groups.device)
        offset = ((in_group.cumsum(dim=1) - 1) * in_group).sum(dim=2)
        width = int(in_group.sum(dim=1).max())
        batch, length = groups.shape
        real = groups >= 0
        self.place = torch.where(real, groups * width + offset, 0)
        index = groups.new_full((batch, num_groups * width + 1), length)
        slots = torch.where(real, self.place, num_groups * width)
        index.scatter_(1, slots, torch.arange(length, device=groups.device).expand(batch, -1))
        index = index[:, :-1].view(batch, num_groups, width)
        # Index `length` is padding: it takes the last token's query, and sees the prompt alone.
        segment = torch.cat([layout.segment, layout.segment.new_full((batch, 1), PADDING)], dim=1)
        depth = torch.cat([layout.path_position, layout.path_position.new_zeros(batch, 1)], dim=1)
        rows = torch.arange(batch, device=groups.device)[:, None, None]
        own = visibility_mask(layout.ancestors, segment[rows, index], depth[rows, index])
        prompt = layout.prompt_mask[:, None, None].expand(-1, num_groups, width, -1)
        mask = torch.cat([prompt, own], dim=3).flatten(0, 1)[:, None]
        super().__init__(layout.prompt_mask.shape[1], mask, layout.read_at)
        self.index = index.clamp(max=length - 1)
        self.num_keys = self.num_queries = self.prompt_width + length

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, dropout: float) -> Tensor:
        """Attention of a row whose segments are grouped."""
        out = self._masked(
            self._grouped(query), self._with_prompt(key), self._with_prompt(value), scale=scale, dropout=dropout
        )
        batch, num_groups, width = self.index.shape
        out = out.transpose(1, 2).reshape(batch, num_groups * width, *out.shape[1::2])
        rows = torch.arange(batch, device=out.device)[:, None]
        return out[rows, self.place.to(out.device)].transpose(1, 2)

    def _grouped(self, states: Tensor) -> Tensor:
        """`(B, heads, S, D)` to `(B * G, heads, T, D)`."""
        rows = torch.arange(len(states), device=states.device)[:, None, None]
        return states.transpose(1, 2)[rows, self.index.to(states.device)].flatten(0, 1).transpose(1, 2)

    def _with_prompt(self, states: Tensor) -> Tensor:
        """`(B, heads, P + S, D)` to `(B * G, heads, P + T, D)`."""
        prompt = states[:, None, :, : self.prompt_width].expand(-1, self.index.shape[1], -1, -1, -1).flatten(0, 1)
        return torch.cat([prompt, self._grouped(states[:, :, self.prompt_width :])], dim=2)


class BranchPlan(AttentionPlan):
    """One token per branch of many rows, all in one entry of the batch: N queries, each over the keys of its own row.

    So layers compute nothing for rows with fewer branches than others; only here are they laid side by side. `mask`
    `(R, 1, K, E)` bool: what the K places of a row see of its E keys. `query` `(R, K)`: which of the N queries stands
    at a place (any, where none does). `place` `(N,)`: where among the `R * K` a query stands.
    """

    def __init__(self, mask: Tensor, query: Tensor, place: Tensor) -> None:
        super().__init__(0, mask)
        self.query = query
        self.place = place
        self.num_queries = len(place)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, dropout: float) -> Tensor:
        """Attention of single new tokens of branches."""
        by_row = query[0].transpose(0, 1)[self.query.to(query.device)].transpose(1, 2)
        out = self._masked(by_row, key, value, scale=scale, dropout=dropout)
        return out.transpose(1, 2).flatten(0, 1)[self.place.to(out.device)].transpose(0, 1)[None]


# Scores computed under one mask, over those of the groups: from here on groups are used. On CPU, 4 heads on 2 of width
# 64, behind 1000 tokens: 5 segments of 64 (ratio 1.2) take 3.9 ms under one mask and 4.6 in groups, 20 of 100 (2.7)
# 46 and 28; with gradients 14 and 17, 154 and 92.
GROUPING_PAYS = 1.5


def plan_of(layout: Layout) -> AttentionPlan:
    """The plan for whole rows `[prompt | segments]` in one forward, whichever way computes fewer scores."""
    prompt, length = layout.prompt_mask.shape[1], layout.input_ids.shape[1]
    if length == 0:
        return AttentionPlan(prompt, None, layout.read_at)
    groups = _top_segment(layout)
    num_groups = int(groups.max()) + 1
    width = max(int((groups == group).sum(dim=1).max()) for group in range(num_groups))
    if length * (prompt + length) > GROUPING_PAYS * num_groups * width * (prompt + width):
        return GroupedPlan(layout)
    return AttentionPlan(prompt, layout.mask(), layout.read_at)


def _top_segment(layout: Layout) -> Tensor:
    """`(B, S)` int64: which child of the prompt a token stands in or below, counted within its row; -1 on padding."""
    if layout.ancestors.shape[1] == 0:
        return layout.segment
    # Parents come before their children: the first ancestor of a segment is a child of the prompt.
    top = layout.ancestors.to(torch.int8).argmax(dim=2)
    is_top = top == torch.arange(top.shape[1], device=top.device)
    number = (is_top.cumsum(dim=1) - 1).gather(1, top)
    return torch.where(layout.is_token, number.gather(1, layout.segment.clamp(min=0)), PADDING)
