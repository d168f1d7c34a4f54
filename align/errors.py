"""The one exception a user ever sees: what was expected, what was found, where, and what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class UserError(Exception):
    """A fault in the user's configuration or data, reported without a traceback and with exit code 2.

    >>> str(UserError("chosen equals rejected (question q17)", where="pairs.jsonl:42", fix="run align score again"))
    'pairs.jsonl:42: chosen equals rejected (question q17); run align score again'
    """

    def __init__(self, message: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.message = message
        self.where = where
        self.fix = fix
        text = f"{where}: {message}" if where else message
        super().__init__(f"{text}; {fix}" if fix else text)


@contextlib.contextmanager
def reward_faults() -> Iterator[None]:
    """What `reward` finds wrong with settings, prompts or answers is the user's to mend."""
    from reward.errors import RewardError

    try:
        yield
    except RewardError as error:
        raise UserError(str(error)) from None


def writing_failed(error: Exception) -> str | None:
    """What the system says where a library could not write a file, hidden in an exception of its own; else None.

    >>> writing_failed(OSError(28, "No space left on device", "runs/x"))
    'No space left on device: runs/x'
    >>> writing_failed(RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"))
    'PytorchStreamWriter failed writing file data/3: file write failed'
    >>> writing_failed(RuntimeError("shapes do not match"))
    """
    if isinstance(error, OSError):
        return f"{error.strerror or error}: {error.filename or ''}".rstrip(": ")
    text = str(error)
    of_safetensors = type(error).__name__ == "SafetensorError" and "I/O error" in text
    of_torch = isinstance(error, RuntimeError) and "PytorchStreamWriter" in text
    return text.splitlines()[0] if of_safetensors or of_torch else None
