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
from align.models.record_faults import UnusableRecord

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


@dataclass(frozen=True)
class _Encoded:
    """The places that could be encoded with their inputs (None where none could), and the faults of the others."""

    places: list[int]
    inputs: dict[str, Any] | None
    faults: dict[int, UnusableRecord]


class BatchQueue(Generic[ItemT]):
    """Gives out items in batches of equal `alike`, shortest first, each encoded while the one before is computed.

    `encode` gives the inputs of some items on the CPU, in another thread; `to_device` brings them to the model.
    `length` is any measure of an item's length that is known before it is encoded. `kind` is what `sizer` knows the
    items' sizes by. An item that cannot be encoded by itself either (UnusableRecord) is done once `on_unusable` has
    heard of it; without that its fault is raised. Enter it to have the thread, as in ``with queue:``.
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
        on_unusable: Callable[[ItemT, UnusableRecord], None] | None = None,
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
        self._encode = encode
        self._on_unusable = on_unusable
        self._prefetcher = Prefetcher(self._encoded)

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

    def take(self, most: int | None = None) -> Batch[ItemT] | None:
        """The next items, encoded; `most` of them at most, by itself as many as memory allows. There must be one.

        None where nothing that was left could be encoded.
        """
        allowed = self.sizer.num_items(self.kind)
        count = allowed if most is None else min(most, allowed)
        while self._waiting:
            places = self._next(self._waiting, count)
            del self._waiting[: len(places)]
            self._begun += places
            following = self._next(self._waiting, count) if self.sizer.knows(self.kind) else []
            found: _Encoded = self._prefetcher.get(places, following)
            for place, fault in found.faults.items():
                if self._on_unusable is None:
                    raise fault
                self.done(place)
                self._on_unusable(self.items[place], fault)
            if found.inputs is not None:
                lengths = found.inputs["attention_mask"].sum(dim=1).tolist()
                items = [self.items[i] for i in found.places]
                return Batch(found.places, items, self._to_device(found.inputs), lengths)
        return None

    def done(self, place: int) -> None:
        """An item of `Batch.places` has its answer."""
        self._begun.remove(place)

    def put_back(self) -> None:
        """What was taken and is not done will be given out again."""
        self._waiting, self._begun = self._begun + self._waiting, []

    def _next(self, waiting: list[int], count: int) -> list[int]:
        return list(itertools.takewhile(lambda i: self._alike[i] == self._alike[waiting[0]], waiting[:count]))

    def _encoded(self, places: list[int]) -> _Encoded:
        """The inputs of a batch; where it cannot be encoded, of those items that can be by themselves."""
        try:
            return _Encoded(places, self._encode([self.items[i] for i in places]), {})
        except UnusableRecord as error:
            faults = {places[0]: error} if len(places) == 1 else {}
            for place in places if len(places) > 1 else []:
                faults |= self._encoded([place]).faults
            if not faults:
                raise
        fit = [place for place in places if place not in faults]
        return _Encoded(fit, self._encode([self.items[i] for i in fit]) if fit else None, faults)
