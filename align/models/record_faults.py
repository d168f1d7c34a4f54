"""What a template, tokenizer or processor raises for one record in, an error that names the record out.

Templates are programs that came with a checkpoint: they refuse system turns, roles that do not alternate, or what they
have no words for. Processors refuse pictures (1800 x 4 pixels for Qwen-VL, one scaled to nothing). Such a record can be
left out and counted; a fault of the machine, such as memory that ran out, is none of the record's and passes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from align.errors import UserError, is_out_of_memory
from align.records import LeftOut

# Processor seconds. Rendering a chat takes milliseconds.
MAX_RENDER_S = 5.0
# What an unusable record is counted under.
CANNOT_RENDER = "the chat template cannot render it"
CANNOT_READ = "an image cannot be read"
CANNOT_ENCODE = "the processor cannot encode it"
TOO_LONG = "longer than the model reads"
MACHINE_FAULTS = (MemoryError, AssertionError, ImportError)


class UnusableRecord(UserError):
    """One record cannot be rendered or encoded; `reason` is what it is counted under."""

    def __init__(self, reason: str, message: str, *, where: str, fix: str | None = None) -> None:
        super().__init__(message, where=where, fix=fix)
        self.reason = reason

    def left_out(self, id_: str) -> LeftOut:
        """What a stage writes down of the question with this id."""
        return LeftOut(id=id_, reason=self.reason, message=str(self))


@contextmanager
def record_faults(record: str, reason: str) -> Iterator[None]:
    """Raises what is raised inside as an UnusableRecord about `record`, counted under `reason`.

    Faults of the machine pass: memory that ran out, a package that is missing, our own assertions.

    >>> try:
    ...     with record_faults("question q1", "cannot be encoded"):
    ...         raise ValueError("absolute aspect ratio must be smaller than 200, got 450.0")
    ... except UnusableRecord as error:
    ...     str(error), error.reason
    ('question q1: cannot be encoded: absolute aspect ratio must be smaller than 200, got 450.0', 'cannot be encoded')
    """
    try:
        yield
    except UnusableRecord:
        raise
    except MACHINE_FAULTS:
        raise
    except UserError as error:
        raise UnusableRecord(reason, error.message, where=record, fix=error.fix) from None
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UnusableRecord(reason, f"{reason}: {str(error) or type(error).__name__}", where=record) from None


class TookTooLong(Exception):
    """Python code ran longer than it was allowed to."""


@contextmanager
def bounded_time(seconds: float) -> Iterator[None]:
    """Stops Python code that is called inside after so many processor seconds of this thread.

    For a template that loops for ever (`range` in `range` in `range` is enough).
    Code runs several times slower under the
    trace that watches it: for a check, not for every record. Raises TookTooLong.
    """
    deadline = time.thread_time() + seconds

    def watch(frame: FrameType, event: str, argument: Any) -> Any:
        if time.thread_time() > deadline:
            raise TookTooLong(f"it did not end within {seconds:g} s")
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)


def without_nulls(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose parts have only keys with values.

    `datasets` gives every part the keys of all others; templates that ask `'image' in
    part` then see an image everywhere.

    >>> without_nulls({"role": "user", "content": [{"type": "text", "text": "Why?", "image": None}]})
    {'role': 'user', 'content': [{'type': 'text', 'text': 'Why?'}]}
    """
    content = message.get("content")
    if not isinstance(content, (list, tuple)):
        return dict(message)
    parts = [{key: value for key, value in part.items() if value is not None} for part in content]
    return {**message, "content": parts}
