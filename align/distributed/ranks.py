"""Which of the processes of a launch this one is, and waiting for the others; a single process is rank 0 of 1."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING

from align import accelerator

if TYPE_CHECKING:
    import torch

# One rank may be given much longer questions than another; the default of ten minutes would end the run.
PATIENCE = timedelta(hours=12)
# Exit code of a process of a launch that wants all of them to be started again (EX_TEMPFAIL of sysexits.h).
EXIT_RESTART = 75


def rank() -> int:
    """The number of this process in its launch; 0 without one."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes the launch has; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """True on the one process that speaks and writes manifests."""
    return rank() == 0


def start_process_group(backend: str) -> None:
    """Join the other processes of the launch through this backend, where nothing has joined them yet."""
    import torch

    if world_size() > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group(backend, timeout=PATIENCE)


def least_of_all(value: int, device: torch.device) -> int:
    """The smallest of the processes' values, on every one of them; `device` is that of their collectives."""
    import torch

    if world_size() == 1 or not torch.distributed.is_initialized():
        return value
    # In float64, since not every backend reduces integers; exact up to 2^53.
    found = torch.tensor(float(value), dtype=torch.float64, device=device)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MIN)
    return int(found.item())


def barrier() -> None:
    """Wait until every process of the launch is here."""
    if world_size() == 1:
        return
    from accelerate import PartialState

    PartialState(cpu=accelerator.kind() == "cpu", timeout=PATIENCE).wait_for_everyone()
