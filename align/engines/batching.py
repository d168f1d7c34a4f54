"""Items in; encoded batches of them out, as many at a time as memory allows: order, prefetch and running out of memory.

A path takes batches and says which items are done. What was taken but not done when memory ran out is given out again,
in smaller batches. Items of about the same length come one after the other, so that little of a batch is padding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from align.engines.batch_size import BatchSizer
from align.engines.prefetch import Prefetcher

ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class Batch(Generic[ItemT]):
    """Items with the model's inputs: right-padded prompts, a row per item, on the model's device.

    `places`: the items' indices in what the queue was made of. `num_prompt_tokens`: the real tokens of each prompt.
    """

    places: list[int]
    items: list[ItemT]
    inputs: dict[str, Any]
    num_prompt_tokens: list[int]

    def __len__(self) -> int:
        return len(self.items)


class BatchQueue(Generic[ItemT]):
    """Gives out items in batches of equal `alike`, shortest first, each encoded while the one before is computed.

    `encode` gives the inputs of some items on the CPU, in another thread; `to_device` brings them to the model.
    `length` is any measure of an item's length that is known before it is encoded. `kind` is what `sizer` knows the
    items' sizes by. Enter it to have the thread, as in ``with queue:``.
    """

    def __init__(
        self,
        items: Sequence[ItemT],
        encode: Callable[[list[ItemT]], dict[str, Any]],
        to_device: Callable[[dict[str, Any]], dict[str, Any]],
        *,
        sizer: BatchSizer,
        kind: str,
        alike: Callable[[ItemT], Hashable],
        length: Callable[[ItemT], int],
    ) -> None:
        self.items = list(items)
        self.sizer = sizer
        self.kind = kind
        self._to_device = to_device
        self._alike = [alike(item) for item in self.items]
        order = {key: number for number, key in enumerate(dict.fromkeys(self._alike))}
        self._waiting = sorted(
            range(len(self.items)), key=lambda i: (order[self._alike[i]], length(self.items[i]).bit_length())
        )
        self._begun: list[int] = []
        self._prefetcher = Prefetcher(lambda places: encode([self.items[i] for i in places]))

    def __enter__(self) -> BatchQueue[ItemT]:
        self._prefetcher.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._prefetcher.__exit__(*error)

    def __bool__(self) -> bool:
        """Whether there is an item that nobody has taken."""
        return bool(self._waiting)

    @property
    def num_begun(self) -> int:
        """Items that were taken and are not done."""
        return len(self._begun)

    def take(self, most: int | None = None) -> Batch[ItemT]:
        """The next items, encoded; `most` of them at most, by itself as many as memory allows. There must be one."""
        allowed = self.sizer.num_items(self.kind)
        count = allowed if most is None else min(most, allowed)
        places = self._next(self._waiting, count)
        del self._waiting[: len(places)]
        self._begun += places
        following = self._next(self._waiting, count) if self.sizer.knows(self.kind) else []
        inputs = self._prefetcher.get(places, following)
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        return Batch(places, [self.items[i] for i in places], self._to_device(inputs), lengths)

    def done(self, place: int) -> None:
        """An item of `Batch.places` has its answer."""
        self._begun.remove(place)

    def put_back(self) -> None:
        """What was taken and is not done will be given out again."""
        self._waiting, self._begun = self._begun + self._waiting, []

    def _next(self, waiting: list[int], count: int) -> list[int]:
        return list(itertools.takewhile(lambda i: self._alike[i] == self._alike[waiting[0]], waiting[:count]))
