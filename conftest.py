"""What holds for all tests.

Modules of the plugin subclass vLLM's classes: their doctests are collected where vLLM is installed.
"""

import gc
import importlib.util
from pathlib import Path

import hypothesis
import pytest

# No example has a deadline of its own: a busy machine is no fault.
hypothesis.settings.register_profile("patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("patient")

PLUGIN = Path(__file__).parent / "align" / "engines" / "vllm"
WITHOUT_VLLM = ("__init__.py", "chat_template.py")

collect_ignore_glob: list[str] = []
if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = [str(path) for path in PLUGIN.glob("*.py") if path.name not in WITHOUT_VLLM]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no process is left alone with one at the end (`make tests`)."""
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Take what has been imported out of the garbage collector's sight.

    Trainers and engines collect between models, and to go through every module of every library takes half a second.
    """
    gc.collect()
    gc.freeze()
