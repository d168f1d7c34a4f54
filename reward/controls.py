"""Items in, the same items with other images out: what a critic or a policy says then, it says without looking."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from reward.judgement import Item

BLANK, SHUFFLED = "blank", "shuffled"


@dataclass(frozen=True)
class ControlItem:
    """A question with other images than its own; `id` says which control and which question."""

    id: str
    item: Item


def control_items(items: Sequence[Item], blank: Callable[[Any], Any], *, number: int, seed: int) -> list[ControlItem]:
    """Controls of `number` items that have images, drawn by `seed`: blank ones first, then those of other questions."""
    fit = [item for item in items if item.images]
    drawn = sorted(random.Random(seed).sample(range(len(fit)), min(number, len(fit))))
    chosen = [fit[place] for place in drawn]
    controls = {BLANK: blank_images(chosen, blank), SHUFFLED: shuffle_images(chosen)}
    return [ControlItem(f"{name}:{item.id}", item) for name, changed in controls.items() for item in changed]


def blank_images(items: Sequence[Item], blank: Callable[[Any], Any]) -> list[Item]:
    """The items that have images, each image replaced by what `blank` makes of it (an empty one of its size)."""
    return [replace(item, images=tuple(map(blank, item.images))) for item in items if item.images]


def shuffle_images(items: Sequence[Item]) -> list[Item]:
    """The items with the images of the next item that has as many but different ones; others are left out.

    >>> a, b = Item("a", "?", ("x",), ()), Item("b", "?", ("y",), ())
    >>> [item.images for item in shuffle_images([a, b])]
    [('y',), ('x',)]
    """
    changed = []
    for place, item in enumerate(items):
        following = (*items[place + 1 :], *items[:place])
        donor = next((other for other in following if _can_lend(other, item)), None)
        if item.images and donor is not None:
            changed.append(replace(item, images=donor.images))
    return changed


def _can_lend(donor: Item, item: Item) -> bool:
    return len(donor.images) == len(item.images) and donor.images != item.images
