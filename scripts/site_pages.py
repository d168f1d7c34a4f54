"""Pages of the site that are made, not written: the start from README.md, two more from the root, the reference.

mkdocs calls `on_config` and `on_files`; griffe, which reads the docstrings, calls `Doctests`. The reference has a page
for each group of modules, in the order of README's "Architecture"; what stands in no group is listed with the stages,
so that a new module cannot be forgotten.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
FROM_ROOT = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
# From the first `>>>` to the next empty line.
EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)
REST = "stages"
# Page -> its title and the modules (and packages, with all that is in them) on it.
GROUPS: dict[str, tuple[str, tuple[str, ...]]] = {
    REST: ("Stages and commands", ()),
    "prefix": ("align.prefix: one row per question", ("align.prefix",)),
    "engines": ("align.engines: sampling and scoring", ("align.engines",)),
    "models": ("align.models: families and checkpoints", ("align.models",)),
    "dpo": ("align.dpo: training", ("align.dpo",)),
    "data": ("align.data: public formats", ("align.data",)),
    "report": ("align.report: one HTML page", ("align.report",)),
    "plan": ("align.plan: memory and time before they are paid for", ("align.plan",)),
    "monitoring": (
        "align.monitoring, tracking, status: progress and costs",
        ("align.monitoring", "align.tracking", "align.status"),
    ),
    "chat": ("align.chat: talking to a checkpoint", ("align.chat",)),
    "lmms_eval": ("align.lmms_eval: public benchmarks", ("align.lmms_eval",)),
    "evaluation": ("align.evaluation: held-out metrics", ("align.evaluation",)),
    "run": ("align.run, align.distributed: folders and processes", ("align.run", "align.distributed")),
    "base": (
        "Records, configuration, media",
        ("align.config", "align.records", "align.media", "align.errors", "align.files", "align.statistics"),
    ),
    "reward": ("reward: critics, rankings, pairs", ("reward",)),
}


def public_modules() -> list[str]:
    """The dotted names of all modules of both packages, without those whose name begins with an underscore."""
    found = []
    for package in ("align", "reward"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            if not any(part.startswith("_") for part in name.split(".")):
                found.append(name)
    return sorted(found)


def page_of(module: str) -> str:
    """The page that a module's reference stands on."""
    for page, (_, names) in GROUPS.items():
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return page
    return REST


def reference_pages() -> dict[str, str]:
    """Path in the site -> Markdown."""
    modules = public_modules()
    pages = {
        f"reference/{page}.md": f"# {title}\n\n"
        + "\n\n".join(f"::: {name}" for name in modules if page_of(name) == page)
        for page, (title, _) in GROUPS.items()
    }
    return {path: text + "\n" for path, text in pages.items()}


def from_root(name: str) -> str:
    """A file of the root with its links as they are seen from docs/.

    >>> "](critics.md)" in from_root("README.md"), "](docs/" in from_root("README.md")
    (True, False)
    """
    text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
    for source, page in FROM_ROOT.items():
        text = text.replace(f"]({source})", f"]({page})")
    return re.sub(r"\[([^\]]+)\]\((?:LICENSE|CITATION\.cff|scripts/[^)]*)\)", r"\1", text)


class Doctests(griffe.Extension):
    """Sets the examples of docstrings in code, where Markdown would read brackets as links."""

    def on_instance(self, *, obj: Any, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(r"\n\n```pycon\n\g<0>\n```\n", obj.docstring.value)


def on_config(config: Any) -> Any:
    config.nav.append({"Reference": [{title: f"reference/{page}.md"} for page, (title, _) in GROUPS.items()]})
    return config


def on_files(files: Any, config: Any) -> Any:
    made = {page: from_root(name) for name, page in FROM_ROOT.items()} | reference_pages()
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files
