"""The recipes by name: commented align.yaml files that `align init --recipe NAME` writes out.

They lie here, inside the package, so that they come with every installation; `configs/` is a link to this folder.
"""

from __future__ import annotations

import json
import re
from difflib import get_close_matches
from pathlib import Path

from align.errors import UserError

HERE = Path(__file__).parent
# The lines of a recipe that a person's own paths replace: key on the command line -> where it stands.
PLACES = {
    "policy": re.compile(r"^(policy:).*$", re.MULTILINE),
    "questions": re.compile(r"^(questions:).*$", re.MULTILINE),
    "pairs": re.compile(r"^(pairs_file:).*$", re.MULTILINE),
    "critic": re.compile(r"^(critic:\n(?:  .*\n)*?  model:).*$", re.MULTILINE),
    "image_root": re.compile(r"^(image_root:).*$", re.MULTILINE),
}
DEMO = re.compile(r"\bDEMO/")


def recipe_names() -> list[str]:
    """The names of all recipes."""
    return sorted(path.stem for path in HERE.glob("*.yaml"))


def recipe_text(name: str, **paths: str | None) -> str:
    """The text of a recipe, with `policy`, `questions`, `pairs`,
    `critic` and `image_root` instead of its own where given.

    Raises:
        UserError: there is no such recipe, or it has no place for one of the paths.
    """
    names = recipe_names()
    if name not in names:
        near = get_close_matches(name, names, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"no recipe is called {name!r}{hint}", fix=f"there are: {', '.join(names)}")
    text = (HERE / f"{name}.yaml").read_text(encoding="utf-8")
    text = DEMO.sub(lambda _: f"{(HERE.parent / 'demo').as_posix()}/", text)
    for key, path in paths.items():
        if path is None:
            continue
        found = PLACES[key].search(text)
        if found is None and key == "image_root":
            text = f"{text.rstrip()}\nimage_root: {json.dumps(path, ensure_ascii=False)}\n"
            continue
        if found is None:
            raise UserError(f"the recipe {name} has no place for --{key}", fix="leave it out")
        text = f"{text[: found.start()]}{found.group(1)} {json.dumps(path, ensure_ascii=False)}{text[found.end() :]}"
    return text
