"""The one exception a user ever sees: what was expected, what was found, where, and what to do.

And the predicates that tell what a library's exception means: a file that could not be written, memory that ran out.
"""

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
    """What `reward` finds wrong with settings, prompts or answers is the user's to fix."""
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
    of_torch = isinstance(error, RuntimeError) and ("PytorchStreamWriter" in text or "inline_container" in text)
    return text.splitlines()[0] if of_safetensors or of_torch else None


# What allocators say when there is nothing left: torch on CUDA, ROCm, MPS and CPUs, and the libraries that allocate for
# themselves. cuDNN also calls sizes "not supported" for which it has no memory (pytorch issue 4107). In lower case.
_NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "status_alloc_failed",
    "statusallocfailed",
    "allocation_failed",
    "cudnn_status_not_supported",
    "fatal error :: malloc",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the memory of a GPU or of the machine ran out: less at a time may work.

    >>> is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    True
    >>> is_out_of_memory(RuntimeError("shapes do not match")), is_out_of_memory(UserError("out of memory"))
    (False, False)
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    # torch's AcceleratorError and DistBackendError are RuntimeErrors.
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY)
