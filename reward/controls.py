"""Items in, the same items with other images out: what a critic prefers then, it prefers without looking."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from reward.judgement import Item


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
