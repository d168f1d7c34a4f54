"""Imports run one way (README, "The house"): a walk over the source that holds the rule."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOOR = {
    "errors": 0,
    "statistics": 0,
    "records": 1,
    "images": 1,
    "video": 1,
    "video_file": 1,
    "rundir": 2,
    "seen_images": 3,
    "config": 1,
    "ranks": 0,
    "watch": 2,
    "faults": 1,
    "questionwise": 3,
}
LAYERS = {"models": 3, "prefix": 3, "engines": 4, "data": 3}
STAGES = {"sample", "score", "pairs", "dpo", "evaluate", "lmms_eval", "report", "summary", "card", "reference", "check"}
# These look at all stages.
TOP = {"rounds", "launch", "demo", "cli", "preflight", "plan"}


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def _rooms_used(path: Path) -> set[str]:
    return {_room(name) for name in _imports(path) if name.startswith("align.")}


FILES = sorted((ROOT / "align").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    room = path.relative_to(ROOT / "align").parts[0].removesuffix(".py")
    used = _rooms_used(path) - {room, "__version__"}
    if room in STAGES:
        assert not used & (STAGES | TOP) - {"summary"}, f"a stage imports a stage: {used}"
    elif room in LAYERS:
        assert not used & (STAGES | TOP)
        assert all(LAYERS.get(other, 0) <= LAYERS[room] for other in used)
    elif room in FLOOR:
        assert used <= set(FLOOR)


def test_reward_imports_nothing_of_align():
    for path in (ROOT / "reward").rglob("*.py"):
        assert not {name for name in _imports(path) if name == "align" or name.startswith("align.")}, path


@pytest.mark.parametrize(
    "module",
    ["align.cli", "align.records", "align.rundir", "align.config", "reward.ranking", "reward.pairs", "align.report"],
)
def test_light_modules_do_not_load_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
