"""Batches of items in; their model inputs out, those of the next batch prepared while the model computes this one.

Opening images and cutting them into tiles takes as long as a prefill; one thread does it beside the model.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Prefetcher:
    """`prepare(batch)` run one batch ahead. A guess that was wrong is thrown away."""

    def __init__(self, prepare: Callable[[list[int]], Any]) -> None:
        self._prepare = prepare
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._guess: tuple[list[int], Future[Any]] | None = None

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def get(self, batch: list[int], following: list[int]) -> Any:
        """What `prepare` gives for `batch`, after starting on the batch that is expected to follow.

        An exception of `prepare` is raised here, for the batch that caused it.
        """
        guess, self._guess = self._guess, None
        future = guess[1] if guess is not None and guess[0] == batch else self._pool.submit(self._prepare, batch)
        if following:
            self._guess = (following, self._pool.submit(self._prepare, following))
        return future.result()
