"""What this process takes of memory now and at most: of its GPU where it uses one, else of the machine."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass

from align.monitoring.format import size


@dataclass(frozen=True)
class Footprint:
    """Bytes in use and their peak since the process began; `device` is `cuda` or `cpu`.

    On a GPU these are what torch has allocated, on a CPU what the process holds in memory (RSS).
    """

    used: int
    peak: int
    device: str

    @property
    def text(self) -> str:
        """
        >>> Footprint(2 * 2**30, 3 * 2**30, "cuda").text
        '2.00 GiB (peak 3.00 GiB)'
        """
        return f"{size(self.used)} (peak {size(self.peak)})"

    @property
    def short(self) -> str:
        """
        >>> Footprint(2 * 2**30, 3 * 2**30, "cuda").short, Footprint(5 * 2**20, 6 * 2**20, "cpu").short
        ('2.0/3.0 GiB', '5/6 MiB')
        """
        if self.peak >= 2**30:
            return f"{self.used / 2**30:.1f}/{self.peak / 2**30:.1f} GiB"
        return f"{self.used / 2**20:.0f}/{self.peak / 2**20:.0f} MiB"


def footprint() -> Footprint:
    """Of this process, now; torch is asked only where this process has begun to use a GPU."""
    # Looked up like this, for a thread may look while torch is being imported.
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    if getattr(cuda, "is_initialized", bool)():
        return Footprint(cuda.memory_allocated(), cuda.max_memory_allocated(), "cuda")  # type: ignore[union-attr]
    import psutil

    used = psutil.Process().memory_info().rss
    # ru_maxrss counts KiB on Linux and bytes on macOS.
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Footprint(used, max(used, most), "cpu")
