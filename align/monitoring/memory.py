"""What this process takes of memory now and at most: of its GPU where it uses one, else of the machine."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from align import accelerator
from align.monitoring.format import size


@dataclass(frozen=True)
class MemoryUsage:
    """Bytes in use and their peak since the process began; `device` is `cpu`, `cuda` or another accelerator.

    On a GPU these are what torch has allocated, on a CPU what the process holds in memory (RSS).
    """

    used: int
    peak: int
    device: str

    @property
    def text(self) -> str:
        """
        >>> MemoryUsage(2 * 2**30, 3 * 2**30, "cuda").text
        '2.00 GiB (peak 3.00 GiB)'
        """
        return f"{size(self.used)} (peak {size(self.peak)})"

    @property
    def short(self) -> str:
        """
        >>> MemoryUsage(2 * 2**30, 3 * 2**30, "cuda").short, MemoryUsage(5 * 2**20, 6 * 2**20, "cpu").short
        ('2.0/3.0 GiB', '5/6 MiB')
        """
        if self.peak >= 2**30:
            return f"{self.used / 2**30:.1f}/{self.peak / 2**30:.1f} GiB"
        return f"{self.used / 2**20:.0f}/{self.peak / 2**20:.0f} MiB"


def memory_usage() -> MemoryUsage:
    """Of this process, now; torch is asked only where this process has begun to use a GPU."""
    module = accelerator.in_use()
    if module is not None and hasattr(module, "max_memory_allocated"):
        return MemoryUsage(module.memory_allocated(), module.max_memory_allocated(), accelerator.name_of(module))
    import psutil

    memory = psutil.Process().memory_info()
    return MemoryUsage(memory.rss, max(memory.rss, _peak(memory)), "cpu")


def _peak(memory: Any) -> int:
    """The most bytes this process has held so far; `memory` is psutil's `memory_info`."""
    try:
        import resource
    except ImportError:
        # Windows, where psutil knows.
        return memory.peak_wset
    # ru_maxrss counts KiB on Linux and bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
