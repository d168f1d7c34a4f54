"""docs/migrating.md as data: its tables, its examples, and what they say is taken where a key is left out."""

from __future__ import annotations

import re

from tests.doc_pages import ROOT, blocks_of

PAGE = ROOT / "docs" / "migrating.md"
BLOCKS = {block.title: block.text for block in blocks_of(PAGE) if block.title is not None}
SECTIONS = {"trl": "From TRL", "llama-factory": "From LLaMA-Factory", "ms-swift": "From ms-swift"}


def section(title: str) -> str:
    found = re.search(rf"^## {title}$(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert found
    return found[1]


def table_of(tool: str) -> dict[str, str]:
    """Their `key`, or `key: value` for one value alone, to what stands for it here, in the words of the code's tables."""
    found: dict[str, str] = {}
    for theirs, here in re.findall(r"^\| (.*?) \| (.*?) \|$", section(SECTIONS[tool]), re.M):
        ours = re.findall(r"`([^`]+)`", here)
        if here.startswith("nothing"):
            text = "-"
        elif here.startswith("one more in"):
            text = "sft"
        elif here.endswith("in `dpo.freeze`"):
            text = f"freeze {ours[0]}"
        elif here.endswith(", a list"):
            text = f"list {ours[0]}"
        else:
            text = "; ".join(ours)
        if not theirs.startswith("fields of"):
            found |= dict.fromkeys(re.findall(r"`([^`]+)`", theirs), text)
    return found


def defaults() -> dict[str, list[str]]:
    """Our settings to the cells of their row: what the three trainers take, and what is taken here."""
    rows = re.findall(r"^\| `([\w.]+)` \| (.*) \|$", section("What they leave out"), re.M)
    return {name: re.split(r" \| ", rest) for name, rest in rows}
