"""Given responses in, their log-probabilities under a checkpoint out: a line per question, kept when interrupted.

One model is in memory at a time.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from align import accelerator
from align.engines.vllm.hosting import release
from align.errors import UserError
from align.media.images import ImageStore
from align.models.record_faults import CANNOT_READ, UnusableRecord, record_faults
from align.records import ResponseLogProbs
from align.run.sharding import OnRecord, StageOutput, batches, map_resumable

if TYPE_CHECKING:
    from align.engines.base import Engine, GivenResponses

QUESTIONS_AT_A_TIME = 256
# More digits would say how the responses were put into batches.
DIGITS = 5


class OneModel:
    """The engine that this process has open: another checkpoint takes its place, and never stands beside it."""

    def __init__(self, open_engine: Callable[[str], Engine]) -> None:
        self._open_engine = open_engine
        self._checkpoint: str | None = None
        self._engine: Engine | None = None

    def get(self, checkpoint: str) -> Engine:
        """An engine with this checkpoint; the one before is let go first."""
        if self._engine is None or self._checkpoint != checkpoint:
            self.close()
            self._engine, self._checkpoint = self._open_engine(checkpoint), checkpoint
        return self._engine

    def open_with(self, open_engine: Callable[[str], Engine]) -> None:
        """Open what is asked for from now on in another way."""
        self.close()
        self._open_engine = open_engine

    def close(self) -> None:
        """Give back the model's memory."""
        self._engine = self._checkpoint = None
        release()
        gc.collect()
        accelerator.empty_cache()


def weigh(
    final: Path,
    given: Sequence[GivenResponses],
    checkpoint: str,
    models: OneModel,
    *,
    images: ImageStore,
    label: str,
    temperature: float = 1.0,
) -> StageOutput:
    """`ResponseLogProbs` of every question's responses when drawn at this temperature, in `final`.

    Questions with an image that cannot be read any more are left out.
    """

    def work(todo: list[GivenResponses], on_record: OnRecord) -> dict[str, str]:
        engine = models.get(checkpoint)
        finished: set[str] = set()

        def on_result(id_: str, rows: list[list[float]]) -> None:
            finished.add(id_)
            sums = [round(math.fsum(row), DIGITS) for row in rows]
            on_record(ResponseLogProbs(id=id_, log_probs=sums, num_tokens=[len(row) for row in rows]))

        for some in batches(todo, QUESTIONS_AT_A_TIME):
            try:
                engine.loglikelihood(some, on_result, temperature=temperature)
            except UserError:
                # Only now are all images opened once more, to see which of them it was.
                unfinished = [item for item in some if item.id not in finished]
                readable = [item for item in unfinished if _is_readable(item, images, on_record)]
                if len(readable) == len(unfinished):
                    raise
                engine.loglikelihood(readable, on_result, temperature=temperature)
        return engine.notes

    return map_resumable(final, ResponseLogProbs, given, work, label=label)


def _is_readable(item: GivenResponses, images: ImageStore, on_record: OnRecord) -> bool:
    """Whether every image of an item can be opened; else it is left out."""
    try:
        with record_faults(f"question {item.id}", CANNOT_READ):
            for image in item.images:
                images.open(image)
    except UnusableRecord as fault:
        on_record(fault.left_out(item.id))
        return False
    return True
