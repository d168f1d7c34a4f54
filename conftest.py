"""What holds for all tests.

Modules of the plugin subclass vLLM's classes: their doctests are collected where vLLM is installed.
"""

import functools
import gc
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.forks import remember_packages

# No example has a deadline of its own: a busy machine is no fault.
hypothesis.settings.register_profile("patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("patient")

PLUGIN = Path(__file__).parent / "align" / "engines" / "vllm"
WITHOUT_VLLM = ("__init__.py", "chat_template.py")

collect_ignore_glob: list[str] = []
if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = [str(path) for path in PLUGIN.glob("*.py") if path.name not in WITHOUT_VLLM]


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """A module without examples is not imported to look for them."""
    is_module = collection_path.suffix == ".py" and not collection_path.name.startswith(("test_", "conftest"))
    return True if is_module and ">>>" not in collection_path.read_text(encoding="utf-8") else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no process is left alone with one at the end (`make tests`)."""
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The tests of a file go to one process; so do all files that fork (`tests/forks.py`), which import much once."""
    from xdist.scheduler import LoadFileScheduling

    class LoadFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path: str = super()._split_scope(nodeid)
            return "files that fork" if _forks(config.rootpath / path) else path

    return LoadFile(config, log)


@functools.cache
def _forks(path: Path) -> bool:
    """Whether a file of tests has processes forked."""
    forks = r"from tests\.(?:forks|served)|in_two_processes|from tests\.stage_runs import .*\b(?:align|Command)\b"
    return re.search(forks, path.read_text(encoding="utf-8")) is not None


def pytest_collection_finish() -> None:
    remember_packages()
    _freeze()


def pytest_runtest_setup() -> None:
    if len(sys.modules) > _num_frozen + 100:
        _freeze()


_num_frozen = 0


def _freeze() -> None:
    """Take what has been imported out of the garbage collector's sight.

    Trainers and engines collect between models, and to go through every module of every library takes half a second.
    """
    global _num_frozen
    gc.collect()
    gc.freeze()
    _num_frozen = len(sys.modules)
