"""Iterative preference alignment of vision-language models: sample, score, DPO, round after round.

    from align import load_config, run_rounds

    result = run_rounds(load_config("align.yaml"))

What is named here is the public interface; it is imported when it is asked for, so that `import align` is instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from align.config import Config, load_config
    from align.engines.local import LocalEngine
    from align.errors import UserError
    from align.loop import RunResult, StageResult, run_rounds, run_stage
    from align.report import write_report

__version__ = "0.1.0"
__all__ = [
    "Config",
    "LocalEngine",
    "RunResult",
    "StageResult",
    "UserError",
    "load_config",
    "run_rounds",
    "run_stage",
    "write_report",
]
_HOMES = {
    "Config": "align.config",
    "LocalEngine": "align.engines.local",
    "RunResult": "align.loop",
    "StageResult": "align.loop",
    "UserError": "align.errors",
    "load_config": "align.config",
    "run_rounds": "align.loop",
    "run_stage": "align.loop",
    "write_report": "align.report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'align' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
