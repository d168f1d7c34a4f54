"""Keys and values of many questions in, a row of the cache each; rows are filled, extended and used again out.

transformers' layers append what they are given. Here the caller says beforehand where the next states go: whole prompts
into rows of their own, segments behind every prompt, or one token per branch at a place of its own. So a finished
question's row goes to the next one, and nothing that others have there is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

# Rows get room for this many tokens more whenever they are full: making room copies what is there.
CAPACITY_STEP = 256


class Placement(Protocol):
    """Where the states of the next forward go. `num_keys`: how many columns its queries may see."""

    @property
    def num_keys(self) -> int:
        """How many columns of the cache are read."""

    def store(self, states: Tensor, stored: Tensor) -> Tensor:
        """Put new states into the stored ones `(R, heads, C, D)`; returns what the attention shall see."""
        ...


@dataclass(frozen=True)
class PromptPlacement:
    """Whole prompts `(n, heads, P, D)` into `rows` `(n,)`; they see nothing but themselves."""

    rows: Tensor
    num_keys: int

    def store(self, states: Tensor, stored: Tensor) -> Tensor:
        """Put keys or values where they belong; returns those to attend to."""
        stored[self.rows.to(stored.device), :, : self.num_keys] = states
        return states


@dataclass(frozen=True)
class SegmentPlacement:
    """Segments `(R, heads, S, D)` behind column `start` of all rows."""

    start: int
    num_keys: int

    def store(self, states: Tensor, stored: Tensor) -> Tensor:
        """Put keys or values where they belong; returns those to attend to."""
        stored[:, :, self.start : self.num_keys] = states
        return stored[:, :, : self.num_keys]


@dataclass(frozen=True)
class TokenPlacement:
    """One token per branch, `(1, heads, N, D)`, at `row` and `column` `(N,)`;
    seen are `num_keys` columns of `num_rows`."""

    row: Tensor
    column: Tensor
    num_rows: int
    num_keys: int

    def store(self, states: Tensor, stored: Tensor) -> Tensor:
        """Put keys or values where they belong; returns those to attend to."""
        stored[self.row.to(stored.device), :, self.column.to(stored.device)] = states[0].transpose(0, 1)
        return stored[: self.num_rows, :, : self.num_keys]


class RowCache(Cache):
    """A cache of rows `(R, heads, C, D)` per layer; `placement` is set before every forward."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.placement: Placement | None = None
        self.num_rows = 0
        self.capacity = 0

    def reserve(self, num_rows: int, num_columns: int) -> None:
        """See that there are so many rows and columns; what is stored stays."""
        self.num_rows = max(self.num_rows, num_rows)
        if num_columns > self.capacity:
            self.capacity = -(-num_columns // CAPACITY_STEP) * CAPACITY_STEP

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """What transformers' layers call: store the states as placed, and return what they shall see."""
        assert self.placement is not None
        while len(self.layers) <= layer_idx:
            self.layers.append(RowLayer())
        layer = self.layers[layer_idx]
        layer.make_room(self.num_rows, self.capacity, key_states, value_states)
        return self.placement.store(key_states, layer.keys), self.placement.store(value_states, layer.values)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0 for prompts, which begin here; the number of columns otherwise."""
        return 0 if isinstance(self.placement, PromptPlacement) or self.placement is None else self.placement.num_keys

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """The number of keys that the attention will see, and no offset."""
        assert self.placement is not None
        return self.placement.num_keys, 0

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy whole rows onto others."""
        for layer in self.layers:
            for stored in (layer.keys, layer.values):
                stored[list(targets)] = stored[list(sources)]


class RowLayer(DynamicLayer):
    """The keys and values of one layer. It does not know its cache, which would then outlive its last user."""

    keys: Tensor
    values: Tensor

    def make_room(self, num_rows: int, capacity: int, key_states: Tensor, value_states: Tensor) -> None:
        """Have so many rows and columns for states like these; what is stored stays."""
        keys, values = (
            _roomy(self.keys, num_rows, capacity, key_states),
            _roomy(self.values, num_rows, capacity, value_states),
        )
        self.keys, self.values, self.is_initialized = keys, values, True
        self.dtype, self.device = keys.dtype, keys.device


def _roomy(stored: Any, num_rows: int, capacity: int, states: Tensor) -> Tensor:
    """The stored keys or values, moved to where there is room."""
    size = (num_rows, states.shape[1], capacity, states.shape[3])
    if stored is not None and stored.shape == size:
        return stored
    # Zeros: what no query sees is still multiplied, by 0, and must be finite.
    roomy = states.new_zeros(size)
    if stored is not None:
        roomy[: stored.shape[0], :, : stored.shape[2]] = stored
    return roomy


def to_device(values: Any, device: torch.device) -> Tensor:
    """Whole numbers as an int64 tensor on the device, without a wait of the host."""
    made = torch.tensor(values, dtype=torch.int64)
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device)
