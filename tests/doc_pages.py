"""A Markdown page in, its code blocks and its commands in their order out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL = ("sh", "bash", "shell", "console")
PROGRAMS = (
    "align",
    "python",
    "pytest",
    "make",
    "pip",
    "git",
    "vllm",
    "sbatch",
    "srun",
    "accelerate",
    "transformers",
    "hf",
)
PROGRAMS_AS_WORDS = re.compile(rf"^(?:exec |\$ )?(?:{'|'.join(PROGRAMS)}|scripts/\S+)(?: |$)", re.MULTILINE)
FENCE = re.compile(r'^(?P<indent> *)```(?P<language>\w*)(?: title="(?P<title>[^"]+)")?(?P<flags>[^\n`]*)$')
INLINE = re.compile(rf"(?<!`)`((?:{'|'.join(PROGRAMS)}|scripts/)[^`]*)`(?!`)")


@dataclass(frozen=True)
class Block:
    """A piece of code; `language` is empty where the page names none."""

    language: str
    title: str | None
    flags: str
    text: str
    line: int

    @property
    def is_shell(self) -> bool:
        return self.language in SHELL or (not self.language and PROGRAMS_AS_WORDS.search(self.text) is not None)


def blocks_of(page: Path) -> list[Block]:
    """Fenced blocks, and blocks of lines that are indented by four behind an empty line."""
    found, lines, index = [], page.read_text(encoding="utf-8").splitlines(), 0
    while index < len(lines):
        fence = FENCE.match(lines[index])
        start = index + 1
        if fence:
            end = next(at for at in range(start, len(lines)) if lines[at].strip() == "```")
            text = "\n".join(line.removeprefix(fence["indent"]) for line in lines[start:end])
            found.append(Block(fence["language"], fence["title"], fence["flags"].strip(), text + "\n", start))
            index = end + 1
        elif lines[index].startswith("    ") and index and not lines[index - 1].strip():
            end = index
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            found.append(Block("", None, "", "\n".join(line[4:] for line in lines[index:end]).rstrip() + "\n", start))
            index = end
        else:
            index += 1
    return found


def scripts_of(page: Path) -> list[tuple[int, str]]:
    """Line and text of everything that a reader might type, in order: shell blocks, and commands inside of a sentence.

    A command that is only named (`align check`) is no script, nor is one with an ellipsis.
    """
    text = page.read_text(encoding="utf-8")
    found = [(block.line, block.text) for block in blocks_of(page) if block.is_shell]
    inside = re.sub(
        r"^ *```.*?^ *```$|^    [^\n]*$", lambda block: "\n" * block[0].count("\n"), text, flags=re.M | re.S
    )
    for match in INLINE.finditer(inside):
        command = " ".join(match[1].split())
        shortest = 2 if command.startswith(("make ", "python ", "scripts/")) else 3
        if len(command.split()) >= shortest and "..." not in command:
            program = "python " if command.startswith("scripts/") and ".py" in command else ""
            line = inside.count("\n", 0, match.start()) + 1
            found.append((line, program + command.replace("\\|", "|") + "\n"))
    return sorted(found)


def name_of(page: Path) -> str:
    """A page's path below docs/, or its name in the root."""
    return page.relative_to(ROOT / "docs" if ROOT / "docs" in page.parents else ROOT).as_posix()


def named_commands(page: Path) -> set[str]:
    """The names behind `align` anywhere on a page."""
    return set(re.findall(r"(?:^|`|\$ )align ([a-z]+)\b", page.read_text(encoding="utf-8"), flags=re.MULTILINE))
