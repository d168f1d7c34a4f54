"""Imports run one way (README, "Architecture"): every allowed arrow between folders stands here,
and there is no circle."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What each folder (or module beside them) may import, lazily or not. `align` is the package itself; what stands in
# BASE may be imported from everywhere.
BASE = {
    "accelerator",
    "versions",
    "errors",
    "log",
    "records",
    "config",
    "sources",
    "files",
    "statistics",
    "secrets",
    "strict_yaml",
    "reward",
    "align",
}
ALLOWED: dict[str, set[str]] = {
    "reward": set(),
    "align": {"config", "engines", "errors", "loop", "report", "versions"},
    "__main__": {"cli"},
    "accelerator": set(),
    "errors": {"reward"},
    "log": set(),
    "secrets": set(),
    "strict_yaml": set(),
    "versions": {"errors"},
    "statistics": {"reward"},
    "files": {"errors", "log"},
    "records": {"errors", "reward"},
    "config": {"errors", "reward", "strict_yaml"},
    "sources": {"config", "errors", "records"},
    # What stands below every stage.
    "media": {"config", "errors", "files", "versions"},
    "distributed": BASE,
    "monitoring": BASE | {"distributed"},
    "run": BASE | {"distributed", "media", "monitoring"},
    "recipes": BASE,
    "migrate": BASE | {"dpo"},
    # What answers for a model.
    "prefix": {"errors"},
    "models": BASE | {"media", "prefix"},
    "data": BASE | {"media", "monitoring"},
    "tracking": BASE | {"evaluation", "run"},
    "engines": BASE | {"distributed", "models", "monitoring", "prefix", "run"},
    # The stages, and what looks at them.
    "stages": BASE | {"data", "distributed", "engines", "media", "models", "monitoring", "run"},
    "dpo": BASE | {"distributed", "engines", "media", "models", "monitoring", "prefix", "run", "tracking"},
    "evaluation": BASE | {"distributed", "engines", "media", "models", "monitoring", "run"},
    "lmms_eval": BASE | {"distributed", "engines", "evaluation", "media", "models", "monitoring", "run"},
    "hub": BASE | {"evaluation", "models", "monitoring", "run"},
    "report": BASE | {"evaluation", "media", "monitoring", "run"},
    "status": BASE | {"monitoring", "report", "run"},
    "plan": BASE | {"dpo", "engines", "evaluation", "media", "models", "prefix"},
    "selftest": BASE | {"check", "demo", "distributed", "dpo", "engines", "media", "models", "plan", "prefix", "run"},
    "check": BASE
    | {"data", "distributed", "dpo", "engines", "evaluation", "hub", "media", "models", "monitoring", "plan", "run"}
    | {"stages"},
    "label": BASE | {"chat", "media", "run"},
    "chat": BASE | {"engines", "hub", "media", "models"},
    # What runs the stages.
    "loop": BASE | {"check", "distributed", "engines", "evaluation", "hub", "monitoring", "report", "run", "tracking"},
    "demo": BASE | {"evaluation", "loop", "report", "run"},
    "cli": BASE
    | {"chat", "check", "data", "demo", "distributed", "engines", "evaluation", "hub", "label", "lmms_eval", "loop"}
    | {"migrate", "models", "monitoring", "plan", "recipes", "report", "run", "selftest", "status"},
}


def _imports(path: Path) -> set[str]:
    """The dotted names that a file imports, at its top or within a function; relative ones are within their folder."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("align", "reward")}


def _files(root: Path) -> dict[str, Path]:
    """Every module of both packages by its dotted name."""
    found = {}
    for package in ("align", "reward"):
        for path in (root / package).rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _folder(module: str) -> str:
    """
    >>> _folder("align.dpo.train"), _folder("align.config"), _folder("align"), _folder("reward.critics")
    ('dpo', 'config', 'align', 'reward')
    """
    package, _, rest = module.partition(".")
    return package if package == "reward" or not rest else rest.split(".")[0]


def _modules_of(name: str, files: dict[str, Path]) -> str | None:
    """The module that an imported name stands in: the name itself, or what it is an attribute of."""
    while name and name not in files:
        name = name.rpartition(".")[0]
    return name or None


def broken_rules(root: Path) -> list[str]:
    """Every import that the table does not allow, every module without a place, every circle of modules or folders."""
    files = _files(root)
    arrows: dict[str, set[str]] = {}
    for module, path in files.items():
        used = {_modules_of(name, files) for name in _imports(path)} - {None, module}
        arrows[module] = {name for name in used if name is not None}
    broken = [f"{module} has no place in the table" for module in files if _folder(module) not in ALLOWED]
    folders: dict[str, set[str]] = {}
    for module, used in arrows.items():
        here = _folder(module)
        for name in used:
            there = _folder(name)
            if there == here or name == "align":
                continue
            folders.setdefault(here, set()).add(there)
            if there not in ALLOWED.get(here, set()):
                broken.append(f"{module} imports {name}: {here} may not import {there}")
    broken += [f"circle of modules: {' -> '.join(circle)}" for circle in _circles(arrows)]
    broken += [f"circle of folders: {' -> '.join(circle)}" for circle in _circles(folders)]
    return sorted(broken)


def _circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """One circle for each starting point that lies on one.

    >>> _circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})
    [['a', 'b', 'c', 'a'], ['b', 'c', 'a', 'b'], ['c', 'a', 'b', 'c']]
    """
    found = []
    for start in sorted(arrows):
        came_from, queue = {start: ""}, [start]
        while queue:
            here = queue.pop(0)
            if start in arrows.get(here, ()):
                path = [here]
                while path[0] != start:
                    path.insert(0, came_from[path[0]])
                found.append([*path, start])
                break
            for there in sorted(arrows.get(here, ())):
                if there not in came_from:
                    came_from[there] = here
                    queue.append(there)
    return found


def test_imports_run_one_way():
    assert broken_rules(ROOT) == []


def test_the_table_names_only_what_there_is():
    assert set(ALLOWED) == {_folder(module) for module in _files(ROOT)}


FORBIDDEN = [
    ("align/stages/critic_metrics.py", "from align.loop import run_stage", "stages may not import loop"),
    ("align/statistics.py", "import align.run.folder", "statistics may not import run"),
    ("align/stages/sample.py", "from align.dpo.train import run_dpo", "stages may not import dpo"),
    ("align/prefix/layout.py", "def f():\n    from align.engines import local", "prefix may not import engines"),
    ("align/media/images.py", "from align.media.video import read_frames", "circle of modules: align.media.images"),
    ("reward/pairs.py", "from align import config", "reward may not import config"),
    ("align/surprise.py", "import json", "align.surprise has no place in the table"),
    ("align/unknown/new.py", "import json", "align.unknown.new has no place in the table"),
]


def test_the_rule_sees_forbidden_imports(tmp_path):
    for package in ("align", "reward"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=lambda _, names: [n for n in names if _skip(n)])
    for module, line, _ in FORBIDDEN:
        path = tmp_path / module
        path.parent.mkdir(exist_ok=True)
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        path.write_text(f"{before}\n\n{line}\n", encoding="utf-8")
    broken = broken_rules(tmp_path)
    for module, _, complaint in FORBIDDEN:
        assert any(complaint in line for line in broken), module


def _skip(name: str) -> bool:
    return "." in name and not name.endswith(".py")


@pytest.mark.parametrize(
    "module",
    ["align", "align.cli", "align.records", "align.run.folder", "align.config", "reward.pairs", "align.report"],
)
def test_light_modules_do_not_load_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
